"""Measures how good models are: scores on tasks and on a user's rows, and whether two models differ."""
