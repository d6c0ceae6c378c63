"""Predicts by arithmetic whether a run fits in memory, and how fast it is."""
