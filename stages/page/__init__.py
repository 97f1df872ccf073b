"""The report page: facts from disk, sections of blocks, one HTML file."""
