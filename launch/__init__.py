"""Launchers that start training on Cloud TPU, GKE, Slurm and in local processes; see docs/launch.md."""
