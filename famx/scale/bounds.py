"""The least time that a program takes on a chip with the published rates, whatever limits it.

Two bounds. `roofline`: operations, main memory traffic and interconnect traffic of the whole program,
each at its full rate and all at once; the largest of the three. `scheduled`: instruction after
instruction as the program has them, each as long as its operations or its memory traffic take; what
the schedule lets run beside, copies and collectives, counts where a run of a loop has more of it than
of anything else. What no rate is published for (vector operations, latencies) is left out of both.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence

from famx.base.chips import Chip
from famx.scale.costs import DCN, Collective, Region


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds of one run of a program on each device.

    Attributes:
      compute, memory: of its operations and its main memory traffic.
      interconnect: of what goes over the links of a slice, on the busiest axis of the torus.
      network: of what goes to other slices.
      scheduled: see the module.
    """

    compute: float
    memory: float
    interconnect: float
    network: float
    scheduled: float

    @property
    def roofline(self) -> float:
        """The least seconds that a step takes: the largest of its parts."""
        return max(self.compute, self.memory, self.interconnect, self.network)

    @property
    def limit(self) -> str:
        """What the roofline is made by."""
        names = ("compute", "memory", "interconnect", "network")
        return max(names, key=lambda name: getattr(self, name))


class Network:
    """How the devices of a program are connected.

    Of rings and lines it is assumed that all their links are used all the time, both ways; whatever
    XLA does in its stead takes longer. A permutation sends each message along the axes in turn.

    A program is that of one slice; what goes to others passes through the hosts.

    Args:
      devices: of one slice, in the order of the program's partitions.
      chip: theirs.
    """

    def __init__(self, devices: Sequence, chip: Chip):
        self.chip = chip
        self.coords = [tuple(getattr(d, "coords", None) or ()) for d in devices] if chip.axes else None
        self.shape = ()
        if self.coords:
            self.shape = tuple(max(axis) + 1 for axis in zip(*self.coords))
        self.closed = [size % chip.wrap == 0 and size > 2 for size in self.shape]

    def seconds(self, collectives: collections.Counter) -> tuple[float, float]:
        """Of the interconnect and of the network, for so many of these collectives."""
        axes = collections.Counter()
        links = collections.Counter()
        network = 0.0
        for collective, count in collectives.items():
            if collective.size < 2:
                continue
            if collective.kind.startswith(DCN):
                network += count * collective.sent / self.chip.network if self.chip.network else 0.0
            elif collective.kind == "collective-permute":
                self._permute(collective, count, links)
            else:
                for axis, seconds in self._inside(collective).items():
                    axes[axis] += count * seconds
        for (axis, *_), bytes_ in _busiest(links).items():
            axes[axis] += bytes_ / self.chip.link
        return max(axes.values(), default=0.0), network

    def _inside(self, collective: Collective) -> dict[int, float]:
        """Seconds on each axis of the torus."""
        members, n = collective.groups[0], collective.size
        if not self.chip.link:
            return {}
        passes = 2 if collective.kind == "all-reduce" else 1
        if not self.coords:
            return {0: passes * collective.bytes * (n - 1) / n / self.chip.link}
        extents = [len(set(values)) for values in zip(*(self.coords[m] for m in members))]
        used = [axis for axis, extent in enumerate(extents) if extent > 1]
        rings = {
            axis: 2 if self.closed[axis] and extents[axis] == self.shape[axis] else 1 for axis in used
        }
        if collective.kind in ("all-to-all", "ragged-all-to-all"):
            # Half of the data crosses the middle of an axis.
            own = lambda axis: collective.bytes * extents[axis] / 4 / rings[axis] / self.chip.link
            return {axis: own(axis) for axis in used}
        seconds = passes * collective.bytes * (n - 1) / n / (sum(rings.values()) * self.chip.link)
        return dict.fromkeys(used, seconds)

    def _permute(self, collective: Collective, count: int, links: collections.Counter) -> None:
        """Adds the bytes on each link."""
        for source, target in collective.groups:
            if self.coords:
                for link in self._route(self.coords[source], self.coords[target]):
                    links[link] += count * collective.bytes
            elif self.chip.link and source != target:
                links[0, source] += count * collective.bytes

    def _route(self, here: tuple[int, ...], there: tuple[int, ...]):
        """Links `(axis, place, direction)` on the way, the shorter one around a ring."""
        here = list(here)
        for axis, size in enumerate(self.shape):
            way = there[axis] - here[axis]
            if self.closed[axis] and abs(way) > size / 2:
                way -= int(math.copysign(size, way))
            for _ in range(abs(way)):
                step = int(math.copysign(1, way))
                yield axis, tuple(here), step
                here[axis] = (here[axis] + step) % size


def _busiest(links: collections.Counter) -> dict[tuple, float]:
    """Of each axis the link with the most bytes."""
    found = {}
    for axis, group in itertools.groupby(sorted(links, key=lambda link: link[0]), lambda link: link[0]):
        link = max(group, key=lambda link: links[link])
        found[axis, link] = links[link]
    return found


def bound(program: Region, chip: Chip, network: Network) -> Bound:
    """The bounds of a program, as `costs.count` found it, on every one of its devices."""
    interconnect, away = network.seconds(program.all_collectives())
    return Bound(
        compute=program.total("flops") / chip.flops,
        memory=program.total("bytes") / chip.bandwidth,
        interconnect=interconnect,
        network=away,
        scheduled=sum(runs * once(region, chip, network) for runs, _, region in program.walk()),
    )


def once(region: Region, chip: Chip, network: Network) -> float:
    """Seconds of one run of a region by its schedule, inner loops apart."""
    work = sum(max(flops / chip.flops, moved / chip.bandwidth) for flops, moved in region.work)
    return max(work, region.bytes / chip.bandwidth, *network.seconds(region.collectives))
