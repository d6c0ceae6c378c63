"""Reads records, turns them into rows of token ids with a loss mask, and groups rows into batches."""
