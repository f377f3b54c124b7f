"""Who is at the other end of a connection: a role and a name, taken from the verified certificate and nothing else.

A certificate of the pool carries it twice: as its whole subject, ``CN=<role>-<name>`` (one RDN, because QEMU's
``tls-authz`` compares the whole DN as text), and as a URI SAN ``emp://<pool>/<role>/<name>``. Both must agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from emp.model.errors import BadInput, Unauthenticated
from emp.model.names import check_name

_CN_LENGTH = 63  # the CN is also a DNS label (63), and X.509 ends a CN at 64


class Role(StrEnum):
    """What a certificate entitles to. No value has a hyphen, so that ``<role>-<name>`` parses."""

    CONTROLLER = "controller"
    AGENT = "agent"
    VOLUMES = "volumes"
    POWER = "power"
    """The power switch of the pool's nodes (a BMC, or the lab's)"""
    QEMU = "qemu"
    """A node's QEMU processes: good for the migration stream and NBD, refused by every daemon."""


@dataclass(frozen=True, slots=True)
class Identity:
    """One daemon of the pool; ``str()`` gives its common name, such as ``agent-n1``."""

    role: Role
    name: str

    def __post_init__(self) -> None:
        check_name(self.name)
        if len(self.cn) > _CN_LENGTH:
            limit = _CN_LENGTH - len(self.role) - 1
            raise BadInput(
                f"{self.name!r} is too long for a certificate of the role {self.role}",
                field="name",
                hint=f"at most {limit} characters",
            )

    @property
    def cn(self) -> str:
        """Common name, and the DNS name under which TLS verifies this daemon whatever its address is."""
        return f"{self.role}-{self.name}"

    def uri(self, pool: str) -> str:
        return f"emp://{pool}/{self.role}/{self.name}"

    def __str__(self) -> str:
        return self.cn

    @classmethod
    def parse(cls, text: str) -> Identity:
        """Return the identity written as ``<role>-<name>``; ``BadInput`` otherwise."""
        role, _, name = text.partition("-")
        if role not in set(Role):
            raise BadInput(
                f"{text[:80]!r} names no role", field="identity", hint=f"<role>-<name>, role one of {', '.join(Role)}"
            )
        return cls(Role(role), name)

    @classmethod
    def from_certificate(cls, subject: Sequence[tuple[str, str]], uris: Sequence[str], *, pool: str) -> Identity:
        """Return the identity in a verified certificate's ``subject`` (attribute, value) and URI SANs.

        Raises ``Unauthenticated`` when the certificate is not one of this ``pool`` or contradicts itself.
        """
        if len(subject) != 1 or subject[0][0] != "commonName":
            raise Unauthenticated(
                "the certificate's subject is not one common name", hint="issue it with this pool's CA"
            )
        try:
            identity = cls.parse(subject[0][1])
        except BadInput as error:
            raise Unauthenticated(f"the certificate names nobody of a pool: {error.message}") from None
        ours = [uri for uri in uris if uri.startswith("emp://")]
        if ours != [identity.uri(pool)]:
            shown = ", ".join(ours)[:200] or "none"
            raise Unauthenticated(
                f"the certificate of {identity} is not one of the pool {pool}: its URI name is {shown}",
                hint=f"expected {identity.uri(pool)}",
            )
        return identity

    @classmethod
    def from_peercert(cls, peercert: Mapping[str, Any] | None, *, pool: str) -> Identity | None:
        """Return the identity in what ``ssl.SSLObject.getpeercert()`` gave; None when no certificate was presented."""
        if not peercert:
            return None
        subject = [pair for rdn in peercert.get("subject", ()) for pair in rdn]
        uris = [value for kind, value in peercert.get("subjectAltName", ()) if kind == "URI"]
        return cls.from_certificate(subject, uris, pool=pool)


def qemu_dn(identity: Identity) -> str:
    """Return the DN as QEMU's ``authz-simple`` and ``authz-list`` compare it."""
    return f"CN={identity.cn}"
