"""Seconds of collectives on slices whose links are counted by hand; bounds of small programs."""

import collections
import itertools
import types

import pytest

from famx.base.chips import CHIPS, find, peak_flops
from famx.scale.bounds import Network, bound
from famx.scale.collectives import DCN, Collective
from famx.scale.costs import Region

V5E, V5P = CHIPS["TPU v5 lite"], CHIPS["TPU v5"]


def torus(*shape):
    """Devices of a slice of this shape, the last axis running fastest."""
    return [
        types.SimpleNamespace(coords=list(place)) for place in itertools.product(*map(range, shape))
    ]


def seconds(network, kind, groups, size, count=1):
    return network.seconds(collections.Counter({Collective(kind, groups, size): count}))


def test_a_gather_uses_every_axis_both_ways_where_it_is_a_ring():
    network = Network(torus(4, 4, 4), V5P)
    everyone = (tuple(range(64)),)
    assert seconds(network, "all-gather", everyone, 6.4e9)[0] == pytest.approx(6.3e9 / (6 * 90e9))
    assert seconds(network, "all-reduce", everyone, 6.4e9)[0] == pytest.approx(12.6e9 / (6 * 90e9))
    along = tuple(tuple(range(i, i + 4)) for i in range(0, 64, 4))
    assert seconds(network, "all-gather", along, 4e9)[0] == pytest.approx(3e9 / (2 * 90e9))
    part = tuple((i, i + 1) for i in range(0, 64, 2))  # half of a ring is a line
    assert seconds(network, "reduce-scatter", part, 4e9)[0] == pytest.approx(2e9 / 90e9)


def test_an_axis_of_fewer_than_sixteen_chips_is_no_ring_on_flat_slices():
    assert Network(torus(4, 4), V5E).closed == [False, False]
    assert Network(torus(16, 16), V5E).closed == [True, True]
    assert Network(torus(2, 4, 8), V5P).closed == [False, True, True]


def test_collectives_on_different_axes_do_not_wait_for_each_other():
    network = Network(torus(4, 4), V5E)
    rows = tuple(tuple(range(i, i + 4)) for i in range(0, 16, 4))
    columns = tuple(tuple(range(i, 16, 4)) for i in range(4))
    both = collections.Counter({
        Collective("all-gather", rows, 4_000_000_000): 2,
        Collective("all-gather", columns, 4_000_000_000): 1,
    })  # fmt: skip
    assert network.seconds(both)[0] == pytest.approx(2 * 3e9 / 45e9)


def test_messages_of_a_permutation_share_the_links_on_their_way():
    line, ring = Network(torus(4), V5E), Network(torus(16), V5E)
    forth = tuple((i, (i + 1) % 4) for i in range(4))
    # On a line the last one's message goes back over every link, but the other way.
    assert seconds(line, "collective-permute", forth, 45e9)[0] == pytest.approx(1)
    far = tuple((i, (i + 2) % 16) for i in range(16))
    assert seconds(ring, "collective-permute", far, 45e9)[0] == pytest.approx(2)
    back = tuple((i, (i - 2) % 16) for i in range(16))
    assert ring.seconds(collections.Counter({
        Collective("collective-permute", far, 45_000_000_000): 3,
        Collective("collective-permute", back, 45_000_000_000): 3,
    }))[0] == pytest.approx(6)  # fmt: skip


def test_all_to_all_crosses_the_middle():
    network = Network(torus(4, 4), V5E)
    row = (tuple(range(4)),)
    # Two chips on either side: each sends half of its gigabyte across, over one link.
    assert seconds(network, "all-to-all", row, 1e9)[0] == pytest.approx(2 * 0.5e9 / 45e9)


@pytest.mark.parametrize("kind, size, sent", [
    ("all-reduce", 8e9, 2 * 8e9 * 3 / 4), ("all-gather", 8e9, 8e9 * 3 / 4),
    ("collective-permute", 8e9, 8e9),
])  # fmt: skip
def test_what_goes_to_other_slices_takes_the_network(kind, size, sent):
    network = Network(torus(2, 2), V5E)
    found = seconds(network, DCN + kind, ((0, 1, 2, 3),), size, count=3)
    assert found == (0, pytest.approx(3 * sent / V5E.network))


def test_the_schedule_adds_what_the_roofline_overlaps():
    loop = Region("loop", 10, work=[(197e12, 0), (0, 819e9)])
    program = Region("program", 1, work=[(0, 819e9)], inner=[loop])
    found = bound(program, V5E, Network(torus(1), V5E))
    assert (found.compute, found.memory) == (10, 11)
    assert found.roofline == 11 and found.limit == "memory" and found.scheduled == 21


def test_traffic_beside_the_work_of_a_loop_is_hidden_until_it_is_more():
    groups = ((0, 1, 2, 3),)
    gather = lambda size: collections.Counter([Collective("all-gather", groups, size)])
    make = lambda size: Region("program", 1, [(197e12, 0)], collectives=gather(size))
    network = Network(torus(4), V5E)
    assert bound(make(20e9), V5E, network).scheduled == 1
    assert bound(make(120e9), V5E, network).scheduled == 2


def test_every_tpu_of_the_table_is_found_by_its_kind():
    names = {kind: find(kind).name for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite")}
    assert list(names.values()) == ["v4", "v5e", "v5p", "v6e"]
    assert peak_flops("cpu") is None
