"""Settings: one row each, how they are read and checked."""
