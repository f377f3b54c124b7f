"""A witness whose thread has died has seen nothing since: the block that it watched must not pass for clean."""

from __future__ import annotations

import threading

import pytest

from emp.lab.checkers.witness import Witness


class Sighted(Witness):
    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__("sighted")
        self.failure = failure
        self.looked = threading.Event()
        self.closed = False

    def watch(self) -> None:
        self.looked.set()
        if self.failure is not None:
            raise self.failure
        self._stop.wait()

    def close(self) -> None:
        self.closed = True


def test_it_watches_until_the_block_ends() -> None:
    with Sighted() as witness:
        assert witness.looked.wait(5)
        assert not witness.closed
    assert witness.closed


def test_what_ended_it_is_raised_at_the_end_of_the_block() -> None:
    witness = Sighted(OSError("no such tap"))
    with pytest.raises(OSError, match="no such tap"), witness:
        witness.looked.wait(5)
    assert witness.closed


def test_it_hides_no_error_of_the_block() -> None:
    with pytest.raises(ValueError, match="what was asked"), Sighted(OSError("no such tap")) as witness:
        witness.looked.wait(5)
        raise ValueError("what was asked")
