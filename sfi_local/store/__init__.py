"""Models on disk: their files, what is in them, how they are fetched."""
