"""Objectives: what a run trains toward."""
