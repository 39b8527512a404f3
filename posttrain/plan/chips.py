"""TPU chips: what each generation can do, and by which names its slices go.

The one table of hardware; topology.py reads names of slices by it, analytic.py works out times.
Peaks are what vendors state: a floor made of them is what no program can be under, and no
measurement. Sources, all under docs.cloud.google.com/tpu/docs unless said otherwise, of Nov 2026:

arithmetic, memory's speed    system-architecture-tpu-vm, v4, v5e, v5p, v6e, tpu7x ("peak compute
                              per chip (bf16)", "HBM bandwidth per chip")
links                         the same pages: "bidirectional ICI bandwidth per chip" over ports and
                              over two directions (v5e 400 GB/s over 4 ports, v5p and tpu7x 1,200
                              over 6, v6e 800 over 4; v4: 2,400 Gb/s each way over 6)
network between slices        the same pages: Gb/s a pod over its chips (v5e), or a chip
memory                        what libtpu 0.0.42.1 calls "available HBM" of one device
names, sizes of slices        the same pages; GKE's "plan TPUs"; for tpu7x xpk's core/
                              system_characteristics.py
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
# what a cloud name stands for; other shapes of as many chips exist on GKE alone
_V4 = (*_SMALL_CUBES, "4x8x8", "8x8x8", "8x8x12", "8x8x16", "8x16x16")
_V5P = (
    *(*_SMALL_CUBES, "4x4x12", "4x8x8", "4x8x12", "8x8x8", "8x8x12", "8x8x16"),
    *("8x12x16", "8x16x16", "12x16x16", "16x16x16", "16x16x24"),
)
_TPU7X = (*_SMALL_CUBES, "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")


@dataclass(frozen=True)
class Chip:
    """One generation. Rates are of a whole chip, sizes of memory of one of its devices."""

    name: str
    """As in a topology's name, v6e:16x16."""
    cloud: str
    """As in the cloud's name of a slice, v5litepod-256."""
    cloud_units: int
    """What the number there counts, per chip: 2 where it counts TensorCores."""
    kind: str
    """What JAX calls a device of it (device.device_kind)."""
    tflops: float
    """Peak dense bfloat16 TFLOP/s."""
    hbm_gib: float
    """What one device's program may use, in GiB."""
    hbm_gbs: float
    """Peak GB/s between HBM and the chip."""
    link_gbs: float
    """Peak GB/s of one link to a neighbour, in one direction; there are two links an axis."""
    dcn_gbs: float
    """GB/s of the data centre's network, its share of a chip, in one direction."""
    topologies: tuple[str, ...]
    """Slices that the cloud has a name for."""
    max_chips: int
    """Of one slice."""
    devices: int = 1
    """JAX devices a chip."""
    config: str = ""
    """How libtpu is to see a chip, where that is not its default."""

    @property
    def axes(self) -> int:
        """Of its torus: 2 or 3."""
        return self.topologies[0].count("x") + 1

    @property
    def wrapped(self) -> int:
        """A side of the torus that is a multiple of this is a ring; others are open lines."""
        return 16 if self.axes == 2 else 4


CHIPS = {
    # v4's two cores are one device ("megacore"), as they are on the machines themselves
    "v4": Chip("v4", "v4", 2, "TPU v4", 275, 30.75, 1228, 50, 6.25, _V4, 4096, config="megacore"),
    "v5e": Chip("v5e", "v5litepod", 1, "TPU v5 lite", 197, 15.75, 819, 50, 3.125, _FLAT, 256),
    "v5p": Chip("v5p", "v5p", 2, "TPU v5", 459, 95.74, 2765, 100, 6.25, _V5P, 6144),
    "v6e": Chip("v6e", "v6e", 1, "TPU v6 lite", 918, 31.25, 1638, 100, 12.5, _FLAT, 256),
    "tpu7x": Chip(
        *("tpu7x", "tpu7x", 2, "TPU7x", 2307, 94.75, 7380, 100, 12.5, _TPU7X, 9216), devices=2
    ),
}
