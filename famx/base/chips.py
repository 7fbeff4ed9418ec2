"""Published rates of accelerators, against which utilisation and bounds are measured.

Sources for TPUs: the tables "Key specifications" of Google Cloud's pages on v4, v5e, v5p and v6e; for the
links of the interconnect and the data center network the chapter on TPUs of "How To Scale Your Model"
(jax-ml), which gives attained rates (Cloud's own figures are a tenth higher). For GPUs: NVIDIA's data
sheets, dense bfloat16 without sparsity, of the SXM form where there are several, and its table of compute
capabilities.
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
      capability: CUDA compute capability; () for a TPU.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float = 0.0
    axes: int = 0
    wrap: int = 1
    network: float = 0.0
    capability: tuple[int, ...] = ()


def _gpu(name, tera, giga, bandwidth, capability, link=0) -> Chip:
    """A GPU, of which NVIDIA states TFLOP/s, GB, and GB/s of main memory and NVLink."""
    return Chip(name, tera * 1e12, giga * 1e9, bandwidth * 1e9, link * 1e9, capability=capability)


_GIB = 2**30
# Chips by a part of JAX's device kind; the first match counts.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32 * _GIB, 1200e9, 45e9, 3, 4, 6.25e9),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * _GIB, 819e9, 45e9, 2, 16, 3.125e9),
    "TPU v5e": Chip("v5e", 197e12, 16 * _GIB, 819e9, 45e9, 2, 16, 3.125e9),
    "TPU v5": Chip("v5p", 459e12, 95 * _GIB, 2765e9, 90e9, 3, 4, 6.25e9),
    "TPU v6": Chip("v6e", 918e12, 32 * _GIB, 1638e9, 90e9, 2, 16, 12.5e9),
    "H100 PCIe": _gpu("H100 PCIe", 756, 80, 2000, (9, 0)),
    "H100": _gpu("H100", 989, 80, 3350, (9, 0), 450),
    "GH200": _gpu("GH200", 989, 96, 4000, (9, 0), 450),
    "H200": _gpu("H200", 989, 141, 4800, (9, 0), 450),
    "B200": _gpu("B200", 2250, 180, 7700, (10, 0), 900),
    "A100": _gpu("A100", 312, 80, 2039, (8, 0), 300),
    "L40S": _gpu("L40S", 362, 48, 864, (8, 9)),
    "L4": _gpu("L4", 121, 24, 300, (8, 9)),
    "V100": _gpu("V100", 125, 32, 900, (7, 0), 150),
}
TPUS = ("v4", "v5e", "v5p", "v6e")


def find(device_kind: str) -> Chip | None:
    """The chip of JAX's device kind; None if it is unknown, as for CPUs."""
    return next((chip for name, chip in CHIPS.items() if name in device_kind), None)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations per second of a device kind; None if it is unknown."""
    chip = find(device_kind)
    return chip and chip.flops
