"""Adapter layers over a frozen base, their first values, and the choice of the layers that get them."""
