"""Which cases of a test with many the default suite runs."""

import pytest
import sampling

pytest_plugins = ["pytester"]
TESTS = """
import pytest

@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", "abcdefg")
def test_many(name):
    pass

@pytest.mark.slow
def test_long():
    pass

def test_short():
    pass
"""


class Chosen:
    """What is left after all have chosen."""

    def pytest_collection_finish(self, session):
        self.names = [item.name for item in session.items]


@pytest.mark.parametrize(
    "arguments, chosen",
    [
        ((), ["test_many[a]", "test_many[d]", "test_many[g]", "test_short"]),
        (("-m", "slow"), ["test_many[b]", "test_many[c]", "test_many[e]", "test_many[f]", "test_long"]),
        (("-m", ""), [*(f"test_many[{name}]" for name in "abcdefg"), "test_long", "test_short"]),
    ],
)
def test_the_default_suite_and_the_slow_one_are_all_tests(pytester, arguments, chosen):
    pytester.makeini("[pytest]\naddopts = -m 'not slow'\nmarkers =\n    slow\n    sampled\n")
    pytester.makepyfile(test_it=TESTS)
    found = Chosen()
    pytester.inline_run(*arguments, "--collect-only", "-p", "no:cacheprovider", plugins=[sampling, found])
    assert found.names == chosen
