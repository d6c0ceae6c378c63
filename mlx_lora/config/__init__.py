"""All settings, one row each, and how they are read and checked."""
