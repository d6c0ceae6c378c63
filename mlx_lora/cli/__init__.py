"""The commands, one file each: it reads the flags, calls a function and prints the result."""
