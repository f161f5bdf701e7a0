"""sfi-local view: one page that shows where each token looked."""
