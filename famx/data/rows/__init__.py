"""Documents and examples cut, packed and batched into training rows."""
