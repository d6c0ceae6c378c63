"""Loss functions of arrays."""
