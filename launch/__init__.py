"""Starts training on TPU slices, GKE, Slurm clusters and several local processes; see docs/launch.md."""
