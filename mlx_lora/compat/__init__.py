"""Holds all that reaches into other packages: private names, functions and classes that are exchanged."""
