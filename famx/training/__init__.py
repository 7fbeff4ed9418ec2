"""Training: runs, feeds of batches, state passing, optimisers, logs and the training loop."""
