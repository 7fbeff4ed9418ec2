"""What an exception was caused by."""

import pytest

from famx.base.errors import causes
from famx.base.peers import of_a_lost_peer


def test_causes_are_followed_by_either_link():
    first, second, third = OSError(5, "Input/output error"), ValueError("2"), RuntimeError("3")
    third.__cause__, second.__context__ = second, first
    assert list(causes(third)) == [third, second, first]
    assert list(causes(None)) == []


def test_an_exception_raised_from_itself_ends_the_chain():
    with pytest.raises(ValueError) as caught:
        try:
            raise ValueError("once")
        except ValueError as error:
            raise error from error
    assert list(causes(caught.value)) == [caught.value]
    assert not of_a_lost_peer(caught.value)
