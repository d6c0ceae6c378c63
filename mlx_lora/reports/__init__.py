"""Writes the pages about a run's results, which need no network access and no scripts."""
