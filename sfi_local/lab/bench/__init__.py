"""sfi-local bench."""
