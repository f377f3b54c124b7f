"""A secret that does not show itself: in logs, errors, ``repr`` or a format string it reads ``***``.

Deliberately not a ``str``: what would print, join or serialise it by accident fails or shows the mask.
"""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path

from emp.model.errors import BadInput
from emp.wire.files import make_private_dir, read_private, write_private

MASK = "***"


class Secret:
    """A bearer token or the like. Only ``reveal()`` gives the text; ``==`` and ``matches`` take constant time."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        if not text or not text.isascii() or not text.isprintable() or " " in text:
            raise BadInput("a secret is one word of printable ASCII", field="token")
        self._text = text

    @classmethod
    def new(cls) -> Secret:
        """Return a fresh secret of 256 random bits."""
        return cls(secrets.token_urlsafe(32))

    @classmethod
    def read(cls, path: Path) -> Secret:
        """Read a token file; ``NotFound``, or ``BadInput`` when it is empty or readable by others."""
        try:
            return cls(read_private(path).decode("ascii", "replace").strip())
        except BadInput as error:
            raise BadInput(f"{path}: {error.message}", field="token", hint=error.hint) from None

    def write(self, path: Path) -> None:
        """Write a token file, 0600, atomically; its directory is made 0700 if it is not there."""
        if not path.parent.exists():
            make_private_dir(path.parent)
        write_private(path, self._text.encode() + b"\n")

    def reveal(self) -> str:
        return self._text

    def matches(self, given: str) -> bool:
        """Return whether ``given`` is the secret, in a time that does not tell how much of it was right."""
        return hmac.compare_digest(self._text.encode(), given.encode("utf-8", "surrogatepass"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self.matches(other._text)

    def __hash__(self) -> int:
        return hash(("emp.secret", self._text))

    def __repr__(self) -> str:
        return f"Secret({MASK!r})"

    def __str__(self) -> str:
        return MASK

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a secret is not pickled")
