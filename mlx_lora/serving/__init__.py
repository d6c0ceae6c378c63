"""Serving: many adapters on one base, each row of a batch with its own."""
