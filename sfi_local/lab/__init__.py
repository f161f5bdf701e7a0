"""Measurements: speed, fidelity, and models made for them. No product code stands on it."""
