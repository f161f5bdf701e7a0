"""What is measured once per model, and remembered."""
