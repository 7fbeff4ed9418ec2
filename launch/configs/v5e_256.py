"""One slice of 256 chips of TPU v5e, as a queued resource, at spot prices."""

from launch import settings


def get_config():
    return settings.tpu(accelerator="v5litepod-256", provisioning="spot")
