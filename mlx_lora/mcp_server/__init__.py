"""Lets an assistant train in one folder, through the Model Context Protocol."""
