"""The words of the NBD protocol, and a client's way into an export: fixed newstyle, simple replies, TLS if asked for.

https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md. What is said before TLS is read from the socket a
message at a time, so that nothing that came in the clear is ever taken for something said under TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import ssl
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Protocol

from emp.wire.sockets import reachable

GREETING = b"NBDMAGICIHAVEOPT"
OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
CLIENT_FLAGS = 3
"""fixed newstyle, no zeroes; a server's handshake flags of these names have the same bits"""
REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698
REQUEST = struct.Struct(">IHHQQI")
"""magic, flags, kind, cookie, offset, length"""
REPLY = struct.Struct(">IIQ")
"""magic, error, cookie"""
OPTION_REPLY = struct.Struct(">QIII")
"""magic, option, kind, length"""
LONGEST_BYTES = 32 << 20
"""of one request's payload; the protocol's own default, and QEMU's"""
_LONGEST_ANSWER_BYTES = 64 << 10
_BUFFER_BYTES = 1 << 20
DEAD_S = 10
"""a peer that acknowledges nothing for that long is gone, and so is the connection to it (tcp(7), TCP_USER_TIMEOUT)"""
TLS_S = 10.0


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7


class Answer(IntEnum):
    """What a server replies to an option."""

    ACK = 1
    SERVER = 2
    INFO = 3
    UNSUPPORTED = (1 << 31) + 1
    POLICY = (1 << 31) + 2
    INVALID = (1 << 31) + 3
    TLS_REQUIRED = (1 << 31) + 5
    UNKNOWN = (1 << 31) + 6
    TOO_BIG = (1 << 31) + 9


INFO_EXPORT = 0


class NoSuchExport(OSError):
    """The server answers, and has no export of that name."""


class Flag(IntFlag):
    """What an export can do: its transmission flags."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    FLUSH = 1 << 2
    FUA = 1 << 3
    ROTATIONAL = 1 << 4
    TRIM = 1 << 5
    WRITE_ZEROES = 1 << 6
    CACHE = 1 << 10
    FAST_ZERO = 1 << 11


class Kind(IntEnum):
    """Of a request."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6


class Wire(Protocol):
    """A way to read and write; before TLS a socket, later a stream."""

    async def readexactly(self, count: int) -> bytes:
        """Raise ``EOFError`` when the other end has gone before."""
        ...

    async def write(self, data: bytes) -> None: ...


class SocketWire:
    """A non-blocking socket of which no more is read than was asked for."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._loop = asyncio.get_running_loop()

    async def readexactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = await self._loop.sock_recv(self._socket, count - len(data))
            if not more:
                raise EOFError("the connection was closed")
            data += more
        return data

    async def write(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._socket, data)


class Stream:
    """What comes after the socket's part: buffered, and under TLS where that was agreed on."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.readexactly = reader.readexactly
        self.at_eof = reader.at_eof
        self.send = writer.write
        """without waiting, which ``drain`` does"""
        self.drain = writer.drain
        """wait until little is left to be sent; raise ``OSError`` when the other end is gone"""

    @classmethod
    async def over(
        cls,
        connection: socket.socket,
        *,
        tls: ssl.SSLContext | None,
        server_hostname: str | None = None,
        is_server: bool = False,
    ) -> Stream:
        """Take the socket over, also to close it; raise ``OSError`` when TLS does not come about."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_BUFFER_BYTES, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        limit_s = None if tls is None else TLS_S
        if is_server:
            making = asyncio.ensure_future(
                loop.connect_accepted_socket(lambda: protocol, connection, ssl=tls, ssl_handshake_timeout=limit_s)
            )
        else:
            hostname = server_hostname if tls else None
            making = asyncio.ensure_future(
                loop.create_connection(
                    lambda: protocol,
                    sock=connection,
                    ssl=tls,
                    server_hostname=hostname,
                    ssl_handshake_timeout=limit_s,
                )
            )
        try:
            transport, _ = await asyncio.shield(making)
        except asyncio.CancelledError:
            # Cancelled before TLS has begun, asyncio 3.11 forgets the transport and leaves it open.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            await asyncio.wait({making})
            if not making.cancelled() and making.exception() is None:
                making.result()[0].abort()
            raise
        return cls(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    async def write(self, data: bytes) -> None:
        self.send(data)
        await self.drain()

    @property
    def common_name(self) -> str | None:
        """Of the certificate that the other end has shown, if that is the whole subject."""
        subject = (self._writer.get_extra_info("peercert") or {}).get("subject", ())
        is_plain = len(subject) == 1 and len(subject[0]) == 1 and subject[0][0][0] == "commonName"
        return str(subject[0][0][1]) if is_plain else None

    @property
    def is_hung_up(self) -> bool:
        """Whether the other end sends nothing more, even if what it has sent is not read yet."""
        if self._writer.transport.is_closing():
            return True
        looked = select.poll()
        looked.register(self._writer.get_extra_info("socket"), select.POLLRDHUP)
        return bool(looked.poll(0))

    def abort(self) -> None:
        self._writer.transport.abort()


@dataclass(frozen=True)
class Export:
    """An export that has been opened: its connection is in the transmission phase."""

    stream: Stream
    size_bytes: int
    flags: int


def pack_request(kind: int, cookie: int, *, flags: int = 0, offset: int = 0, length: int = 0) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, flags, kind, cookie, offset, length)


async def open_tls(host: str, port: int, *, export: str, tls: ssl.SSLContext, tls_hostname: str) -> Export:
    """Open an export under TLS. Raise ``OSError`` or ``EOFError``, saying why."""
    connection = await _connect(host, port)
    keep_alive(connection)
    return await _negotiate(connection, export, tls, tls_hostname)


async def open_unix(path: Path, *, export: str = "") -> Export:
    """Open an export of this machine, in the clear. Raise ``OSError`` or ``EOFError``."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        with reachable(path) as name:
            await asyncio.get_running_loop().sock_connect(connection, name)
    except BaseException:
        connection.close()
        raise
    return await _negotiate(connection, export, None, None)


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel notice a peer that is gone without a word, within ``DEAD_S`` (tcp(7))."""
    if connection.family == socket.AF_UNIX:
        return
    options = {socket.TCP_NODELAY: 1, socket.TCP_KEEPIDLE: 3, socket.TCP_KEEPINTVL: 2, socket.TCP_KEEPCNT: 3}
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (options | {socket.TCP_USER_TIMEOUT: DEAD_S * 1000}).items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


async def _connect(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    failure = OSError(f"{host} is no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        connection.setblocking(False)
        try:
            await loop.sock_connect(connection, address)
        except OSError as error:
            connection.close()
            failure = error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise failure


async def _negotiate(
    connection: socket.socket, export: str, tls: ssl.SSLContext | None, tls_hostname: str | None
) -> Export:
    """Come into the transmission phase; the connection is closed when that fails."""
    wire = SocketWire(connection)
    try:
        if await wire.readexactly(len(GREETING)) != GREETING:
            raise OSError("no NBD server answers there")
        await wire.readexactly(2)
        await wire.write(struct.pack(">I", CLIENT_FLAGS))
        if tls is not None:
            await wire.write(_option_request(Option.STARTTLS))
            await _answers(wire)
    except BaseException:
        connection.close()
        raise
    stream = await Stream.over(connection, tls=tls, server_hostname=tls_hostname)
    try:
        name = export.encode()
        await stream.write(_option_request(Option.GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0)))
        said = [info for info in await _answers(stream) if info[:2] == struct.pack(">H", INFO_EXPORT)]
        if not said or len(said[0]) != 12:
            raise OSError("it does not say how large its export is")
        _, size_bytes, flags = struct.unpack(">HQH", said[0])
    except BaseException:
        stream.abort()
        raise
    return Export(stream, size_bytes, flags)


def _option_request(option: int, data: bytes = b"") -> bytes:
    return OPTION_MAGIC + struct.pack(">II", option, len(data)) + data


async def _answers(wire: Wire) -> list[bytes]:
    """Return what was said before the acknowledgement; raise ``OSError`` when there is none."""
    said: list[bytes] = []
    while True:
        magic, _, kind, length = OPTION_REPLY.unpack(await wire.readexactly(OPTION_REPLY.size))
        if magic != OPTION_REPLY_MAGIC or length > _LONGEST_ANSWER_BYTES or len(said) > 64:
            raise OSError("it does not speak NBD")
        said.append(await wire.readexactly(length))
        if kind not in (Answer.ACK, Answer.INFO):
            refusal = NoSuchExport if kind == Answer.UNKNOWN else OSError
            raise refusal(f"refused ({kind:#x}): {said[-1].decode(errors='replace')}")
        if kind == Answer.ACK:
            return said


def say_goodbye(stream: Stream) -> None:
    """Tell the server that nothing more comes, and let go."""
    with contextlib.suppress(OSError):
        stream.send(pack_request(Kind.DISCONNECT, 0))
    stream.abort()
