"""Slurm job on two nodes of 8 GPUs, requeued every 24 hours (the default time limit)."""

from launch import settings


def get_config():
    return settings.slurm(nodes=2, gpus_per_node=8)
