"""Raw text from its sources to clean, deduplicated, split documents."""
