"""The decoder-only transformer, one component a file, and its directory on disk."""
