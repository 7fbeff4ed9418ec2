"""Files that examples and texts are read from."""
