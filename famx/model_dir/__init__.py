"""A model's directory: checkpoints, its identity, loading, memory files."""
