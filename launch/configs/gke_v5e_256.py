"""A workload on one slice of 256 chips of TPU v5e of a GKE cluster, at spot prices."""

from launch import settings


def get_config():
    return settings.gke(accelerator="v5litepod-256", provisioning="spot", base_image="python:3.12")
