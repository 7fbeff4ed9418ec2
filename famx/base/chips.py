"""What the makers publish of their chips: the rates that utilisation and bounds are measured by.

Sources: of TPUs the tables "Key specifications" of Google Cloud's pages on v4, v5e, v5p and v6e; what
a link of the interconnect carries, and the data center network, "How To Scale Your Model" (jax-ml),
chapter on TPUs, which gives what is attained (Cloud's own figures are a tenth higher). Of GPUs NVIDIA's
data sheets: dense bfloat16 without sparsity, of the SXM form where there are several.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; all rates per second.

    Attributes:
      name: as people say it.
      flops: dense bfloat16 operations.
      memory: bytes of its main memory.
      bandwidth: bytes between the main memory and the chip.
      link: bytes over one link of the interconnect, one way; 0: not known. TPUs have two links along
        each axis of their torus; a GPU's is all of its NVLink.
      axes: of the torus; 0: every device reaches every other alike.
      wrap: an axis of a multiple of so many chips is closed to a ring.
      network: bytes to other slices, through the data center network; 0: not known.
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
# By what the kind of a device contains; the first that fits.
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
    """The chip of a device of this kind; None where it is not known, as for CPUs."""
    return next((chip for name, chip in CHIPS.items() if name in device_kind), None)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations per second of a device of this kind; None where not known."""
    chip = find(device_kind)
    return chip and chip.flops
