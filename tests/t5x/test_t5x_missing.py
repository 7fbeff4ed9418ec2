"""Without t5x: one sentence that says what is missing and where to read on."""

import importlib
import sys

import pytest


@pytest.mark.parametrize("missing", ["t5x", "t5x.trainer"])
def test_the_import_says_what_is_missing_and_where_to_read(monkeypatch, missing):
    for name in [name for name in sys.modules if name.startswith("famx.t5x")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"famx\.t5x needs t5x, airio and jestimator.*docs/t5x\.md"):
        importlib.import_module("famx.t5x")
