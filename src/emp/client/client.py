"""The client: one controller, its nouns, and what is asked of the controller itself."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from emp.client.efs import Efs
from emp.client.events import PATIENCE_S, OnBreak, follow
from emp.client.evms import Evms
from emp.client.migrations import Migrations
from emp.client.nodes import Nodes
from emp.client.nouns import Noun, read_event
from emp.client.transport import ControllerTransport
from emp.client.volumes import Volumes

if TYPE_CHECKING:
    from emp.client.context import Context
    from emp.model.api import Health, WatchEvent


class Client:
    """Everything that people may ask of a pool. Each method raises the typed errors of ``emp.model.errors``.

    Not for several threads at once; a stream that is being read may go on beside requests.
    """

    def __init__(self, context: Context) -> None:
        self._transport = ControllerTransport(context)
        self.context = context
        self.nodes = Nodes(self._transport)
        self.evms = Evms(self._transport)
        self.migrations = Migrations(self._transport)
        self.volumes = Volumes(self._transport)
        self.efs = Efs(self._transport)

    @classmethod
    def from_context(cls, name: str | None = None) -> Self:
        """Return a client of the pool that a context names; None: by ``EMP_CONTEXT``, else the only one there is.

        Raises ``NotFound`` or ``BadInput``.
        """
        from emp.client.context import load_context

        return cls(load_context(name))

    def health(self) -> Health:
        """Raises ``Unreachable``, or ``Unavailable`` for a controller that cannot reach its store."""
        return Noun(self._transport).ask(_health, "GET", "/healthz")

    def watch(
        self,
        prefix: str,
        *,
        since: int | None = None,
        patience_s: float = PATIENCE_S,
        on_break: OnBreak | None = None,
    ) -> Iterator[WatchEvent]:
        """Yield every change below ``prefix`` (``/evms/``, ``/nodes/n1``) for ever, over restarts of the controller.

        ``since``: the revision of a list, so that nothing is missed; None: from now on. Raises ``Unavailable`` after
        ``patience_s`` seconds without the controller.
        """
        stream = follow(
            self._transport,
            "/v1/watch",
            query={"prefix": prefix, "from": since},
            patience_s=patience_s,
            on_break=on_break,
        )
        model = _watch_event()
        for event in stream:
            yield read_event(event, model)

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _health() -> type[Health]:
    from emp.model.api import Health

    return Health


def _watch_event() -> type[WatchEvent]:
    from emp.model.api import WatchEvent

    return WatchEvent
