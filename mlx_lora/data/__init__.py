"""Turns records into token ids with a loss mask, and these into batches."""
