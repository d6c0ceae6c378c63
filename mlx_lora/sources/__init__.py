"""Hub ids, folders, GGUF and data files -> local files and plain records."""
