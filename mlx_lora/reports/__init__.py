"""The verdict on a run, and report pages without network access or scripts."""
