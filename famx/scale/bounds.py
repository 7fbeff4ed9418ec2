"""Lower bounds on the time of a program, from the published rates of a chip.

`roofline` assumes that operations, main memory traffic, interconnect and network traffic all overlap
perfectly at full rate; it is the time of the slowest of them. `scheduled` assumes that instructions run
one after the other in program order, each as long as its operations or its memory traffic take, while
asynchronous copies and collectives overlap with the rest of their loop iteration; they count only where
they take longer than it. Neither includes what has no published rate, such as vector operations and
latencies.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence

from famx.base.chips import Chip
from famx.scale.collectives import DCN, Collective
from famx.scale.costs import Region


@dataclasses.dataclass(frozen=True)
class Bound:
    """Lower bounds for one run of a program, in seconds.

    Attributes:
      compute: time of its operations.
      memory: time of its main memory traffic.
      interconnect: time of its traffic within a slice, on the busiest axis of the torus.
      network: time of its traffic between slices.
      scheduled: time of its schedule, see the module's docstring.
    """

    compute: float
    memory: float
    interconnect: float
    network: float
    scheduled: float

    @property
    def roofline(self) -> float:
        """The largest of compute, memory, interconnect and network."""
        return max(self.compute, self.memory, self.interconnect, self.network)

    @property
    def limit(self) -> str:
        """Name of the resource that determines the roofline."""
        names = ("compute", "memory", "interconnect", "network")
        return max(names, key=lambda name: getattr(self, name))


class Network:
    """The interconnect between the devices of a slice, and the network between slices.

    Collectives are assumed to keep all links of their rings or lines busy in both directions; any other
    algorithm takes longer. A permutation routes each message along one axis after the other. Traffic
    between slices goes through the hosts.

    Args:
      devices: devices of one slice, in the order of the program's partitions.
      chip: the chip of these devices.

    Attributes:
      chip: the chip.
      coords: coordinates of each device in the torus; None if every device reaches every other alike.
      shape: size of the torus along each axis.
      closed: whether each axis is a ring.
    """

    def __init__(self, devices: Sequence, chip: Chip):
        self.chip = chip
        self.coords = [tuple(getattr(d, "coords", None) or ()) for d in devices] if chip.axes else None
        self.shape = ()
        if self.coords:
            self.shape = tuple(max(axis) + 1 for axis in zip(*self.coords))
        self.closed = [size % chip.wrap == 0 and size > 2 for size in self.shape]

    def seconds(self, collectives: collections.Counter) -> tuple[float, float]:
        """Time of a multiset of collectives, as `(interconnect, network)` in seconds."""
        axes = collections.Counter()  # {axis: seconds}
        links = collections.Counter()  # {link: bytes of permutations}
        network = 0.0
        for collective, count in collectives.items():
            if collective.size < 2:
                continue
            if collective.kind.startswith(DCN):
                network += count * collective.sent / self.chip.network if self.chip.network else 0.0
            elif collective.kind == "collective-permute":
                self._permute(collective, count, links)
            else:
                for axis, seconds in self._seconds_by_axis(collective).items():
                    axes[axis] += count * seconds
        for (axis, *_), bytes_ in _busiest(links).items():
            axes[axis] += bytes_ / self.chip.link
        return max(axes.values(), default=0.0), network

    def _seconds_by_axis(self, collective: Collective) -> dict[int, float]:
        """Seconds that a collective within the slice takes on each axis of the torus."""
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
            # Half of the data crosses the middle of an axis, where the traffic is highest.
            crossing = lambda axis: collective.bytes * extents[axis] / 4 / rings[axis]
            return {axis: crossing(axis) / self.chip.link for axis in used}
        seconds = passes * collective.bytes * (n - 1) / n / (sum(rings.values()) * self.chip.link)
        return dict.fromkeys(used, seconds)

    def _permute(self, collective: Collective, count: int, links: collections.Counter) -> None:
        """Adds the bytes of `count` permutations to each link that they use."""
        for source, target in collective.groups:
            if self.coords:
                for link in self._route(self.coords[source], self.coords[target]):
                    links[link] += count * collective.bytes
            elif self.chip.link and source != target:
                links[0, source] += count * collective.bytes

    def _route(self, source: tuple[int, ...], target: tuple[int, ...]):
        """Yields the links `(axis, coordinates, direction)` of a route, the shorter way around rings."""
        position = list(source)
        for axis, size in enumerate(self.shape):
            distance = target[axis] - position[axis]
            if self.closed[axis] and abs(distance) > size / 2:
                distance -= int(math.copysign(size, distance))
            for _ in range(abs(distance)):
                step = int(math.copysign(1, distance))
                yield axis, tuple(position), step
                position[axis] = (position[axis] + step) % size


def _busiest(links: collections.Counter) -> dict[tuple, float]:
    """The link with the most bytes on each axis: `{(axis, link): bytes}`."""
    busiest = {}
    for axis, group in itertools.groupby(sorted(links, key=lambda link: link[0]), lambda link: link[0]):
        link = max(group, key=lambda link: links[link])
        busiest[axis, link] = links[link]
    return busiest


def bound(program: Region, chip: Chip, network: Network) -> Bound:
    """Lower bounds for a program counted by `costs.count`."""
    interconnect, between_slices = network.seconds(program.all_collectives())
    scheduled = sum(
        runs * scheduled_seconds(region, chip, network) for runs, _, region in program.walk()
    )
    return Bound(
        compute=program.total("flops") / chip.flops,
        memory=program.total("bytes") / chip.bandwidth,
        interconnect=interconnect,
        network=between_slices,
        scheduled=scheduled,
    )


def hidden_seconds(program: Region, chip: Chip, network: Network) -> collections.Counter:
    """Seconds of each collective of a GPU program during which other work is scheduled.

    That is the work between its start and its end, at full rate, up to the collective's own time.
    """
    hidden = collections.Counter()
    for runs, _, region in program.walk():
        for exchange, beside in region.beside:
            own = sum(network.seconds(collections.Counter([exchange])))
            hidden[exchange] += runs * min(own, _work_seconds(beside, chip))
    return hidden


def scheduled_seconds(region: Region, chip: Chip, network: Network) -> float:
    """Time of one run of a region by its schedule, without its inner loops."""
    work = _work_seconds(region.work, chip)
    return max(work, region.bytes / chip.bandwidth, *network.seconds(region.collectives))


def _work_seconds(work: Sequence[tuple[float, float]], chip: Chip) -> float:
    """Time of instructions one after the other, each as long as its operations or its bytes take."""
    return sum(max(flops / chip.flops, moved / chip.bandwidth) for flops, moved in work)
