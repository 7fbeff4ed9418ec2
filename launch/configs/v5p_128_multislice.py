"""Queued resource of two reserved slices with 64 TPU v5p chips (128 cores) each.

Set the mesh's `data` axis to at least 2 (`--gin.make_mesh.data=2`), so that only gradients cross the
slow network between slices.
"""

from launch import settings


def get_config():
    return settings.tpu(accelerator="v5p-128", num_slices=2, provisioning="reserved")
