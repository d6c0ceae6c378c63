"""Serves a base and its adapters through HTTP, to OpenAI's clients and a chat page; each row of a batch may use another adapter."""
