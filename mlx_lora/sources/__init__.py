"""Turns hub ids, folders, GGUF files and data files into local files and plain records."""
