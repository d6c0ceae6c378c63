"""All settings, one row each, and how they are read from flags, files and other trainers' files, and checked."""
