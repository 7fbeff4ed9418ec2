"""GKE workload on one spot slice of 256 TPU v5e chips."""

from launch import settings


def get_config():
    return settings.gke(accelerator="v5litepod-256", provisioning="spot", base_image="python:3.12")
