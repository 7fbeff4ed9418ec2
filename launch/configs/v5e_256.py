"""Queued resource of one spot slice with 256 TPU v5e chips."""

from launch import settings


def get_config():
    return settings.tpu(accelerator="v5litepod-256", provisioning="spot")
