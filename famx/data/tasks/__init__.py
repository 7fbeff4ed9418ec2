"""Tasks by name, their examples and mixtures."""
