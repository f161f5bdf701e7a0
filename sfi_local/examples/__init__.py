"""Programs to learn from, and to start: python -m sfi_local.examples.ask"""
