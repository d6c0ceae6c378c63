"""The studio: one local page for models, data, runs, talk and export; everything that it does, a command can do."""
