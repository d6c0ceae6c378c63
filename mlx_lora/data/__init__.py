"""Records -> token ids and loss mask -> batches."""
