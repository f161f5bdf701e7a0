"""What tests of several folders stand on; no fixtures, those are in conftest files."""
