"""Serves many adapters on one base; each row of a batch may use another adapter."""
