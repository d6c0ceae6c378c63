"""Pages without network access or scripts."""
