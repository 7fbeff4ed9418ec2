"""A plugin of pytest: of a test that is `sampled(n)`, the default suite runs one case in n."""

import collections

import pytest


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    """Marks the other cases slow; none with --memory, whose memory every case is to meet."""
    cases = collections.Counter()
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is None or config.getoption("--memory", None):
            continue
        test = item.nodeid.partition("[")[0]
        if cases[test] % marker.args[0]:
            item.add_marker(pytest.mark.slow)
        cases[test] += 1
