"""Generates for many requests at once, each with its own adapter of one base, and reads the requests of OpenAI's clients."""
