"""sfi-local eval, and calibrate."""
