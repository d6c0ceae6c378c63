"""Trains in several processes as one run: ranks, what they exchange, and how they divide rows or a base."""
