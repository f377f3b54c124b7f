"""The pool's volumes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emp.client.nouns import ORDER_S, Noun, part

if TYPE_CHECKING:
    from emp.model.api import Listing
    from emp.model.volume import Volume


class Volumes(Noun):
    def list(self) -> Listing[Volume]:
        return self.ask(_listing, "GET", "/v1/volumes")

    def get(self, id: str) -> Volume:  # noqa: A002
        """Raises ``NotFound``."""
        return self.ask(_volume, "GET", f"/v1/volumes/{part(id, field='volume')}")

    def create(self, size: int | str, *, type: str = "io2", image: str | None = None) -> Volume:  # noqa: A002
        """``size`` in bytes, or such as ``1GiB``; ``image``: what is on it. Raises ``BadInput``, ``NotFound``."""
        body = {"type": type, "size_bytes": size} | ({"image": image} if image else {})
        return self.ask(_volume, "POST", "/v1/volumes", body, timeout_s=ORDER_S)

    def resize(self, id: str, size: int | str) -> Volume:  # noqa: A002
        """Make it bigger, also under a guest that runs. Raises ``BadInput``, ``Conflict``, ``Refused``, ..."""
        path = f"/v1/volumes/{part(id, field='volume')}/resize"
        return self.ask(_volume, "POST", path, {"size_bytes": size}, timeout_s=ORDER_S)

    def register(self, url: str, *, size: int | str | None = None) -> Volume:
        """Tell the pool of storage that every node reaches; ``size``: None where it can be read.

        Raises ``BadInput``, ``AlreadyExists``, ``Refused`` or ``Unavailable``.
        """
        return self.ask(_volume, "POST", "/v1/volumes", {"type": "shared", "url": url, "size_bytes": size})

    def delete(self, id: str) -> None:  # noqa: A002
        """Raises ``NotFound``, or ``Conflict`` while an EVM has it."""
        self.transport.send("DELETE", f"/v1/volumes/{part(id, field='volume')}").answer()


def _volume() -> type[Volume]:
    from emp.model.volume import Volume

    return Volume


def _listing() -> type[Listing[Volume]]:
    from emp.model.api import Listing
    from emp.model.volume import Volume

    return Listing[Volume]
