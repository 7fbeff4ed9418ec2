"""Two slices of 64 chips (128 cores) of TPU v5p each, as one queued resource from a reservation.

Give the mesh's `data` axis at least 2 (`--gin.make_mesh.data=2`), so that only gradients cross slices.
"""

from launch import settings


def get_config():
    return settings.tpu(accelerator="v5p-128", num_slices=2, provisioning="reserved")
