"""Flags have their defaults where no command line was parsed; stubs.py stands beside the tests."""

import pathlib
import sys

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).parent))
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
