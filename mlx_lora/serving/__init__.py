"""Serves many adapters on one base through HTTP; each row of a batch may use another adapter."""
