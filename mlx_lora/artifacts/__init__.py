"""What a run leaves: adapter folders, fused models, exports."""
