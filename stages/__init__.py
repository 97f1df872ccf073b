"""One DVC stage per file, one Typer command per stage."""
