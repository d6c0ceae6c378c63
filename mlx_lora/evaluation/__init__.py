"""Scores answers of a base and its adapters, on lm-eval's tasks and a user's rows, and compares them."""
