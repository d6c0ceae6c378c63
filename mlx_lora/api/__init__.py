"""The functions that Python users and the commands call: load, train, generate, evaluate, plan, export."""
