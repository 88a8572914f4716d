"""One checkpoint format a file."""
