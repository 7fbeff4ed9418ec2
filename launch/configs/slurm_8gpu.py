"""Two nodes of 8 GPUs each, for a day at a time."""

from launch import settings


def get_config():
    return settings.slurm(nodes=2, gpus_per_node=8)
