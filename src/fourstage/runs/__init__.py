"""The store of runs and their records."""
