"""Listening sockets: opened here, or handed over already listening by a parent (systemd's or the lab's)."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from emp.model.errors import BadInput, Conflict

BACKLOG = 256
DEAD_PEER = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 3, socket.TCP_KEEPCNT: 3}
"""s of silence, s between questions, questions without an answer (tcp(7)): a node that is off leaves no connection"""


def listen(host: str, port: int, *, field: str = "listen") -> socket.socket:
    """Return a TCP socket listening on an IP address; port 0 lets the kernel choose.

    ``Conflict`` when the port is taken, ``BadInput`` naming ``field`` when the address is not one of this machine.
    """
    if not 0 <= port <= 65535:
        raise BadInput(f"{port} is not a port", field=field, hint="0 to 65535")
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return _prompt(socket.create_server((host, port), family=family, backlog=BACKLOG))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Conflict(
                f"{where} is already taken", field=field, hint="stop the other process, or choose a port"
            ) from None
        raise BadInput(f"cannot listen on {where}: {error.strerror or error}", field=field) from error


def listen_unix(path: Path, *, mode: int = 0o600) -> socket.socket:
    """Return a unix socket listening at ``path``; one that was left there is replaced.

    ``mode`` says who may connect: by default this user alone.
    """
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with reachable(path) as name:
        listening.bind(name)
    path.chmod(mode)  # nobody gets in between: it does not listen yet
    listening.listen(BACKLOG)
    return listening


@contextlib.contextmanager
def reachable(path: Path) -> Iterator[str]:
    """Give a short name of a unix socket's path, which the kernel takes up to 107 bytes of (unix(7))."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def adopt(fd: int, *, field: str = "listen_fd") -> socket.socket:
    """Return the stream socket that a parent left listening at descriptor ``fd``; ``BadInput`` if it is not one.

    The descriptor now belongs to the result, and no child inherits it further.
    """
    try:
        listening = socket.socket(fileno=os.dup(fd))
    except OSError as error:
        raise BadInput(f"descriptor {fd} is not a socket: {error.strerror}", field=field) from None
    if not listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) or listening.type != socket.SOCK_STREAM:
        listening.close()
        raise BadInput(f"the socket at descriptor {fd} is not listening", field=field)
    os.close(fd)
    return _prompt(listening)


def _prompt(listening: socket.socket) -> socket.socket:
    """Set TCP_NODELAY and keep-alive, which accepted connections inherit.

    asyncio sets the first only on sockets that name their protocol. Without it an answer's second segment waits for the
    client's delayed acknowledgement: 40 ms.
    """
    if listening.family in (socket.AF_INET, socket.AF_INET6):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in DEAD_PEER.items():
            listening.setsockopt(socket.IPPROTO_TCP, option, value)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
