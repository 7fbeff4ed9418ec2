"""Whether a run fits a slice of chips, and how fast it could be there, before there is one."""
