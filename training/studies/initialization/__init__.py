"""Initial weights that are better than random."""
