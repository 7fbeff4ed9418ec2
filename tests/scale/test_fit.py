"""The search for the largest batch, on compilers whose memory is a formula."""

import pytest

from famx.base.chips import CHIPS
from famx.base.errors import ConfigError
from famx.scale import fit
from famx.scale.report import Report, _shortage


def report(batch, needed, available):
    memory = {"parameters": 10, "temporaries": int(needed) - 10}
    return Report(
        "train", "v5e:2x2", {"data": 1, "fsdp": 4}, batch, 8, memory, available, needed <= available, 100,
        CHIPS["TPU v5 lite"],
    )  # fmt: skip


@pytest.mark.parametrize("start", [4, 128, 4000])
@pytest.mark.parametrize("needs", [
    lambda b: 100 + 7 * b, lambda b: 5 * b, lambda b: 900 + b**1.2, lambda b: 100 + 64 * (b // 64 + 1),
])  # fmt: skip
def test_the_largest_batch_is_found_in_few_attempts(start, needs):
    attempts = []

    def attempt(batch):
        attempts.append(batch)
        return report(batch, needs(batch), 2000)

    found = fit.largest_batch(attempt, start, 4)
    best = max(b for b in range(4, 4000, 4) if needs(b) <= 2000)
    assert found.batch == best and found.fits
    assert best + 4 in attempts and len(set(attempts)) == len(attempts) <= 16


def test_without_any_that_fits_it_says_by_how_much_and_what_to_try():
    with pytest.raises(ConfigError, match=r"Not even a batch of 4 fits.*GiB too many.*loss_chunk"):
        fit.largest_batch(lambda batch: report(batch, 2**31 * batch, 2**30), 64, 4)


@pytest.mark.parametrize("message, temporaries, available", [
    (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory"
        " required for HLO temporaries (50.66G) exceeds available HBM (15.75G). HLO module: jit_x.",
        50.66, 15.75,
    ),
    ("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 18.5, 15.75),
])  # fmt: skip
def test_what_the_compiler_says_is_missing(message, temporaries, available):
    found = _shortage(message, 2 * 2**30)
    assert [n / 2**30 for n in found] == pytest.approx([temporaries, available])


def test_other_errors_are_no_shortage():
    assert _shortage("INTERNAL: a bug", 0) is None
