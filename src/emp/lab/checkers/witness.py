"""What a checker that watches all the time has in common: a thread as long as a block, which cannot die unseen."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self


class Witness:
    """``with`` runs ``watch`` in a thread of its own until the block ends, which then raises what ended it before."""

    def __init__(self, name: str) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name)
        self._failure: Exception | None = None

    def watch(self) -> None:
        """Look again and again until ``self._stop`` is set."""
        raise NotImplementedError

    def close(self) -> None:
        """The thread has ended: let go of what it looked with."""

    def _run(self) -> None:
        try:
            self.watch()
        except Exception as error:  # noqa: BLE001 - whatever it was, a witness that saw nothing must not be believed
            self._failure = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.close()
        if self._failure is not None and error is None:
            raise self._failure
