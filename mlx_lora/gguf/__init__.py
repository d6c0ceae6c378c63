"""Reads and writes GGUF files: weights, tokenizers, and the names of their tensors."""
