"""Writes and reads adapter folders, in our form and PEFT's, fuses adapters into models, and writes model cards."""
