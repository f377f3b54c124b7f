"""Contexts: which pool a command means, and how to reach it. One private file per pool, ``NAME.json``.

They lie in ``$EMP_CONTEXT_DIR``, else ``$XDG_CONFIG_HOME/emp/contexts``, else ``~/.config/emp/contexts``. Under sudo
that is the home of the user who called sudo, and the files are theirs: what root makes for them, they can use.
"""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from emp.model.errors import AlreadyExists, BadInput, NotFound
from emp.wire.files import Owner, read_private, write_private
from emp.wire.secret import Secret

ENVIRONMENT = "EMP_CONTEXT"


FIELDS = ("url", "server_name", "ca_pem", "token")


@dataclass(frozen=True)
class Context:
    """How to reach a pool's controller."""

    name: str
    url: str
    """such as ``https://127.0.0.1:7440``"""
    server_name: str
    """the name that the controller's certificate must carry, whatever the address is"""
    ca_pem: str
    """the one certificate authority that is trusted"""
    token: Secret


def invoking_user() -> pwd.struct_passwd:
    """Return the user who works here: under sudo the one who called it."""
    uid = os.environ.get("SUDO_UID", "") if os.geteuid() == 0 else ""
    return pwd.getpwuid(int(uid) if uid.isdigit() else os.geteuid())


def directory() -> Path:
    """Return where contexts are kept; it need not exist."""
    if chosen := os.environ.get("EMP_CONTEXT_DIR"):
        return Path(chosen).absolute()
    user = invoking_user()
    if user.pw_uid != os.geteuid():
        return Path(user.pw_dir) / ".config" / "emp" / "contexts"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config").absolute() / "emp" / "contexts"


def file_of(name: str) -> Path:
    """Return the file of a context; ``BadInput`` for a name that is none."""
    from emp.model.names import check_name  # which imports pydantic: dear, and not needed to load a context

    return directory() / f"{check_name(name, field='context')}.json"


def list_contexts() -> list[str]:
    """Return the names of all contexts, sorted."""
    return sorted(path.stem for path in directory().glob("[!.]*.json"))


def load_context(name: str | None = None) -> Context:
    """Return a context: the one named, else by ``EMP_CONTEXT``, else the only one there is.

    Raises ``NotFound`` for an unknown name, ``BadInput`` when none is named and there are none or several, or when the
    file is damaged or can be read by others.
    """
    name = name or os.environ.get(ENVIRONMENT) or _only_one()
    there = list_contexts()
    if name not in there:
        file_of(name)  # the name may be none at all
        raise NotFound(f"there is no context {name!r}", field="context", hint=f"contexts: {', '.join(there) or 'none'}")
    path = directory() / f"{name}.json"
    try:
        found = json.loads(read_private(path))
        url, server_name, ca_pem, token = (str(found[field]) for field in FIELDS)
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{path} is damaged: {error}", field="context", hint="remove it, and make it anew") from None
    return Context(name, url, server_name, ca_pem, Secret(token))


def _only_one() -> str:
    names = list_contexts()
    if len(names) == 1:
        return names[0]
    if not names:
        raise BadInput(
            "no pool is known here",
            field="context",
            hint=f"`emp lab up` makes one on this machine; contexts are kept in {directory()}",
        )
    raise BadInput(
        f"there are several contexts: {', '.join(names)}",
        field="context",
        hint=f"say which with --context NAME or {ENVIRONMENT}=NAME",
    )


def save_context(context: Context) -> Path:
    """Write a new context, mode 0600, for the invoking user; ``AlreadyExists`` when the name is taken."""
    path = file_of(context.name)
    make_directory()
    content = dict(zip(FIELDS, (context.url, context.server_name, context.ca_pem, context.token.reveal()), strict=True))
    try:
        write_private(path, json.dumps(content, indent=1).encode() + b"\n", owner=_owner(), new=True)
    except AlreadyExists:
        raise AlreadyExists(
            f"there is a context {context.name!r} already", field="context", hint=f"it is {path}"
        ) from None
    return path


def _owner() -> Owner | None:
    """Return to whom what we make belongs, if that is not us."""
    user = invoking_user()
    return (user.pw_uid, user.pw_gid) if user.pw_uid != os.geteuid() else None


def missing_directories() -> list[Path]:
    """Return what ``make_directory`` would make, outermost first."""
    return [path for path in reversed([directory(), *directory().parents]) if not path.exists()]


def make_directory() -> None:
    """Make the directory of contexts if it is missing: private, and the invoking user's own."""
    owner = _owner()
    for path in missing_directories():
        path.mkdir(mode=0o700, exist_ok=True)
        if owner is not None:
            os.chown(path, *owner)


def remove_context(path: Path, *, made: Sequence[Path] = ()) -> None:
    """Remove a context's file, and what is then empty of its directories and of those ``made`` for it. Idempotent."""
    path.unlink(missing_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink(missing_ok=True)  # of a write that was killed
    ours = [parent for parent in (path.parent, path.parent.parent) if parent.name in ("contexts", "emp")]
    for parent in sorted({*ours, *made}, key=lambda parent: len(parent.parts), reverse=True):
        with suppress(OSError):  # not empty, or not there
            parent.rmdir()
