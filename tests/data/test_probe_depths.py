"""`Probe.at_depth` puts what is asked for where it says, and probes without such a place say so."""

import numpy as np
import pytest

from famx.data.probes import PROBES

LENGTH = 3200
WITH_DEPTH = {
    "passkey_words": dict(header=False),
    "passkey_bytes": dict(header=False),
    "ruler_niah_single_1": {},
    "ruler_niah_multikey_1": {},
    "babilong_qa1": dict(instructed=False, facts=(1, 2)),
    "copy_at_distance": {},
    "associative_recall": {},
}


@pytest.mark.parametrize("name", WITH_DEPTH)
def test_what_is_asked_for_is_at_the_depth(name):
    probe, places = PROBES[name](**WITH_DEPTH[name]), []
    for depth in (0.0, 0.25, 0.5, 1.0):
        row = probe.at_depth(depth, LENGTH).example(3, LENGTH)
        text = row["positions"]
        if name == "ruler_niah_multikey_1":  # others are at depths of their own
            value = probe._encode(row["references"][0])
            text = [i for i in range(LENGTH) if np.array_equal(row["tokens"][i : i + len(value)], value)]
        places.append(text[0] / LENGTH)
    assert places[0] < 0.1 and abs(places[1] - 0.25) < 0.1 and abs(places[2] - 0.5) < 0.1
    assert places[3] > 0.85 and places == sorted(places)


def test_the_key_that_counts_is_the_second_of_two():
    probe = PROBES["passkey_words"](header=False, second_key=1.0, second_key_recent=True)
    for depth, low, high in ((0.0, 0.0, 0.1), (0.5, 0.45, 0.55), (1.0, 0.9, 1.0)):
        first, second = probe.at_depth(depth, LENGTH).example(0, LENGTH)["positions"]
        assert first == 0 and low <= second / LENGTH <= high


@pytest.mark.parametrize("name, options, sentence", [
    ("ruler_vt", {}, "VariableProbe asks about its whole text, not about one place in it"),
    ("ruler_cwe", {}, "CommonWordsProbe asks about its whole text"),
    ("ruler_fwe", {}, "CodedWordsProbe asks about its whole text"),
    ("ruler_niah_multivalue", {}, "asks for several values, each at a depth of its own"),
    ("ruler_niah_multiquery", {}, "asks for several values"),
    ("passkey_words", {"second_key": 0.5}, "PassKey's second_key is 0.5"),
    ("associative_recall", {"overwrite": 0.5}, "RecallProbe with overwrite"),
    ("associative_recall", {"spread": True}, "RecallProbe with spread has pairs at several depths"),
])  # fmt: skip
def test_probes_without_a_depth_say_so(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PROBES[name](**options).at_depth(0.5, LENGTH)


def test_every_probe_has_a_depth_or_refuses():
    refused = set()
    for name, make in PROBES.items():
        try:
            make().at_depth(0.5, 4096)
        except ValueError:
            refused.add(name)
    several = {"ruler_niah_multivalue", "ruler_niah_multiquery"}
    assert refused == {"ruler_vt", "ruler_cwe", "ruler_fwe", *several}
