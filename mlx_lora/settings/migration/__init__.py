"""YAML files of other trainers, read as ours."""
