"""Memory needs and time bounds of a run's programs, for chips that need not be available."""
