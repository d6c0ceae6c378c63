"""The local page for models, data, runs, chat and export; everything that it does, a command can do."""
