"""Flags have their defaults where no command line was parsed; stubs.py stands beside the tests.

Nothing is compiled for an estimate unless a test asks for it.
"""

import pathlib
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

sys.path.insert(0, str(pathlib.Path(__file__).parent))
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True)
def without_estimate():
    from launch import estimate  # noqa: F401, defines the flag

    with flagsaver.flagsaver(estimate="no"):
        yield
