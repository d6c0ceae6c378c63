"""Reads other trainers' YAML files as settings of ours."""
