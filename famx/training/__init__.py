"""The engine: checkpoints, logs, optimisers, partitioning and the training loop."""
