"""A local server that trains adapters for clients of Tinker's protocol."""
