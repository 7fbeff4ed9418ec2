"""Published rates of accelerators, against which utilisation and bounds are measured.

Sources for TPUs: the tables "Key specifications" of Google Cloud's pages on v4, v5e, v5p and v6e; for the
links of the interconnect and the data center network the chapter on TPUs of "How To Scale Your Model"
(jax-ml), which gives attained rates (Cloud's own figures are a tenth higher). For GPUs: NVIDIA's data
sheets, dense bfloat16 without sparsity, of the SXM form where there are several.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device in JAX's count; all rates are per second.

    Attributes:
      name: short name.
      flops: dense bfloat16 operations.
      memory: bytes of main memory.
      bandwidth: bytes between main memory and chip.
      link: bytes over one link of the interconnect in one direction; 0: unknown. A TPU has two links
        along each axis of its torus; for a GPU this is the whole NVLink.
      axes: number of axes of the torus; 0: all devices are equally far from each other.
      wrap: an axis whose number of chips is a multiple of this is closed to a ring.
      network: bytes to other slices through the data center network; 0: unknown.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float = 0.0
    axes: int = 0
    wrap: int = 1
    network: float = 0.0


_GIB = 2**30
# Chips by a part of JAX's device kind; the first match counts.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32 * _GIB, 1200e9, 45e9, 3, 4, 6.25e9),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * _GIB, 819e9, 45e9, 2, 16, 3.125e9),
    "TPU v5e": Chip("v5e", 197e12, 16 * _GIB, 819e9, 45e9, 2, 16, 3.125e9),
    "TPU v5": Chip("v5p", 459e12, 95 * _GIB, 2765e9, 90e9, 3, 4, 6.25e9),
    "TPU v6": Chip("v6e", 918e12, 32 * _GIB, 1638e9, 90e9, 2, 16, 12.5e9),
    "H100 PCIe": Chip("H100 PCIe", 756e12, 80e9, 2000e9),
    "H100": Chip("H100", 989e12, 80e9, 3350e9, 450e9),
    "GH200": Chip("GH200", 989e12, 96e9, 4000e9, 450e9),
    "H200": Chip("H200", 989e12, 141e9, 4800e9, 450e9),
    "B200": Chip("B200", 2250e12, 180e9, 7700e9, 900e9),
    "A100": Chip("A100", 312e12, 80e9, 2039e9, 300e9),
    "L40S": Chip("L40S", 362e12, 48e9, 864e9),
    "L4": Chip("L4", 121e12, 24e9, 300e9),
    "V100": Chip("V100", 125e12, 32e9, 900e9, 150e9),
}
TPUS = ("v4", "v5e", "v5p", "v6e")


def find(device_kind: str) -> Chip | None:
    """The chip of JAX's device kind; None if it is unknown, as for CPUs."""
    return next((chip for name, chip in CHIPS.items() if name in device_kind), None)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations per second of a device kind; None if it is unknown."""
    chip = find(device_kind)
    return chip and chip.flops
