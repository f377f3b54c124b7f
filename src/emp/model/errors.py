"""One tree of errors, each with the HTTP status and exit code by which a user meets it.

::

    EmpError                      500 / 1
    ├── BadInput                  422 / 2   the request itself is wrong: ``field`` says where
    ├── NotFound                  404 / 3
    ├── Conflict                  409 / 4   right request, wrong moment (already migrating, stopped, ...)
    │   ├── AlreadyExists
    │   └── StaleEpoch                      an order older than what the node has promised
    ├── Refused                   412 / 5   pre-flight or placement says no, and why
    │   └── NoPlacement
    ├── Unauthenticated           401 / 6
    ├── Forbidden                 403 / 6
    ├── Unavailable               503 / 7   a part of the pool is not there now
    │   ├── NodeDown                        says since when
    │   ├── Unreachable                     the request was never sent: nothing happened
    │   └── StoreUnavailable
    ├── OutcomeUnknown            504 / 8   sent, not answered: read the state, then decide
    ├── MigrationAborted          409 / 9   the EVM is back on its source
    ├── HostError                 500 / 10  a command, netlink or QEMU on a node failed
    │   ├── CommandFailed
    │   ├── HypervisorError
    │   ├── FenceFailed                     the node is not proven off
    │   └── MissingDependency               QEMU absent or too old, no root, ...
    └── Internal                  500 / 1

The exit codes are documented in ``docs/cli.md``.
"""

from __future__ import annotations

from typing import Any, ClassVar


class EmpError(Exception):
    """An error a user can read: what is wrong, in which field, and what to do about it."""

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.hint = hint
        self.details = details

    def as_dict(self) -> dict[str, Any]:
        """Return the body that travels over HTTP; ``error_from_dict`` is its inverse."""
        return {
            "code": self.code,
            "message": self.message,
            "field": self.field,
            "hint": self.hint,
            "details": self.details,
        }

    def __str__(self) -> str:
        text = f"{self.field}: {self.message}" if self.field else self.message
        return f"{text} ({self.hint})" if self.hint else text


class BadInput(EmpError):
    code = "bad_input"
    http_status = 422
    exit_code = 2


class NotFound(EmpError):
    code = "not_found"
    http_status = 404
    exit_code = 3


class Conflict(EmpError):
    code = "conflict"
    http_status = 409
    exit_code = 4


class AlreadyExists(Conflict):
    code = "already_exists"


class StaleEpoch(Conflict):
    """The order carries an epoch older than one the node has already acted on."""

    code = "stale_epoch"


class Refused(EmpError):
    code = "refused"
    http_status = 412
    exit_code = 5


class NoPlacement(Refused):
    """No node fits; ``details["nodes"]`` maps each node to the reason."""

    code = "no_placement"


class Unauthenticated(EmpError):
    code = "unauthenticated"
    http_status = 401
    exit_code = 6


class Forbidden(EmpError):
    code = "forbidden"
    http_status = 403
    exit_code = 6


class Unavailable(EmpError):
    code = "unavailable"
    http_status = 503
    exit_code = 7


class NodeDown(Unavailable):
    """The node's agent does not answer; the message says since when."""

    code = "node_down"


class Unreachable(Unavailable):
    """The peer could not be reached and the request was never sent: nothing has happened."""

    code = "unreachable"


class StoreUnavailable(Unavailable):
    code = "store_unavailable"


class OutcomeUnknown(EmpError):
    """The order was sent and not answered. Never conclude that it did not happen: read the state, then decide."""

    code = "outcome_unknown"
    http_status = 504
    exit_code = 8


class MigrationAborted(EmpError):
    code = "migration_aborted"
    http_status = 409
    exit_code = 9


class HostError(EmpError):
    code = "host_error"
    exit_code = 10


class CommandFailed(HostError):
    """An external command failed; ``details`` has ``argv``, ``returncode`` and ``stderr``."""

    code = "command_failed"


class HypervisorError(HostError):
    """QEMU refused or died; ``details`` has the QMP class or the log's tail where there is one."""

    code = "hypervisor_error"


class FenceFailed(HostError):
    """The node is not proven off: nothing that it could still do may be taken for done."""

    code = "fence_failed"


class MissingDependency(HostError):
    code = "missing_dependency"


class Internal(EmpError):
    code = "internal"


_OWN = frozenset({"message", "field", "hint"})


def _tree(root: type[EmpError]) -> dict[str, type[EmpError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def error_from_dict(body: dict[str, Any]) -> EmpError:
    """Rebuild the typed error that ``EmpError.as_dict`` made; an unknown code becomes a plain ``EmpError``."""
    cls = _tree(EmpError).get(str(body.get("code")), EmpError)
    details = body.get("details")
    return cls(
        str(body.get("message", "no message")),
        field=body.get("field"),
        hint=body.get("hint"),
        **{k: v for k, v in details.items() if k not in _OWN} if isinstance(details, dict) else {},
    )


_BY_STATUS: dict[int, type[EmpError]] = {
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    503: Unavailable,
    504: OutcomeUnknown,
}


def kind_of_status(status: int) -> type[EmpError]:
    """Return the kind of error in an HTTP answer that was not written by a daemon of the pool."""
    return _BY_STATUS.get(status, BadInput if 400 <= status < 500 else Internal)
