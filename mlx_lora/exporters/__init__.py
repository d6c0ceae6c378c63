"""The results of a run: adapter folders, checkpoints, fused models, exports and reports."""
