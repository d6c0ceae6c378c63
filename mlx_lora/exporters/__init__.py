"""The files that leave a run: adapter folders, ours and PEFT's, model cards, fused models, and folders for Ollama."""
