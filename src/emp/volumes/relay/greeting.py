"""The server's half of the handshake: fixed newstyle, one export, simple replies only.

https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md ("Fixed newstyle negotiation", FORCEDTLS).
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable

from emp.volumes.nbd_wire import (
    CLIENT_FLAGS,
    GREETING,
    INFO_EXPORT,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    Answer,
    Option,
    Wire,
)

READ_S = 10.0
"""how long a client may take for its next word before the transmission phase"""
_MOST_OPTIONS = 32
_LONGEST_OPTION_BYTES = 16 << 10
_NO_ZEROES = 2

Facts = Callable[[], Awaitable[tuple[int, int]]]
"""gives size in bytes and transmission flags, once they are known"""


class Unwelcome(Exception):
    """The connection has to be closed: a violation of the protocol, or the way it says no."""


async def greet(wire: Wire) -> int:
    """Say hello; return the client's flags."""
    await wire.write(GREETING + struct.pack(">H", CLIENT_FLAGS))
    (flags,) = struct.unpack(">I", await _read(wire, 4))
    if flags & ~CLIENT_FLAGS:
        raise Unwelcome(f"client flags {flags:#x} are unknown")
    return int(flags)


async def until_tls(wire: Wire) -> None:
    """Answer until the client has asked for TLS and may begin with it."""
    for _ in range(_MOST_OPTIONS):
        option, _ = await _read_option(wire)
        if option == Option.EXPORT_NAME:
            raise Unwelcome("it wants the export without TLS")
        if option in (Option.STARTTLS, Option.ABORT):
            await _reply(wire, option, Answer.ACK)
            if option == Option.STARTTLS:
                return
            raise Unwelcome("it has changed its mind")
        await _reply(wire, option, Answer.TLS_REQUIRED)
    raise Unwelcome("it does not get to the point")


async def agree(wire: Wire, *, export: str, refusal: str | None, client_flags: int, facts: Facts) -> None:
    """Answer until the client has the export; ``refusal``: why it will never get it. Raises ``Unwelcome``."""
    for _ in range(_MOST_OPTIONS):
        option, data = await _read_option(wire)
        if option == Option.ABORT:
            await _reply(wire, option, Answer.ACK)
            raise Unwelcome("it has changed its mind")
        if option == Option.EXPORT_NAME:
            if refusal or data != export.encode():
                raise Unwelcome(refusal or f"there is no export {data[:80]!r}")
            zeroes = b"" if client_flags & _NO_ZEROES else bytes(124)
            await wire.write(struct.pack(">QH", *await facts()) + zeroes)
            return
        if refusal:
            await _reply(wire, option, Answer.POLICY, refusal.encode())
        elif option == Option.LIST:
            await _list(wire, data, export)
        elif option in (Option.INFO, Option.GO):
            if await _inform(wire, option, data, export, facts) and option == Option.GO:
                return
        else:
            await _reply(wire, option, Answer.UNSUPPORTED)
    raise Unwelcome("it does not get to the point")


async def _list(wire: Wire, data: bytes, export: str) -> None:
    if data:
        await _reply(wire, Option.LIST, Answer.INVALID)
        return
    name = export.encode()
    await _reply(wire, Option.LIST, Answer.SERVER, struct.pack(">I", len(name)) + name)
    await _reply(wire, Option.LIST, Answer.ACK)


async def _inform(wire: Wire, option: int, data: bytes, export: str, facts: Facts) -> bool:
    """Return whether the client was told what it asked for. Of what it may ask for, only the export is told."""
    name = _name_in(data)
    if name is None:
        await _reply(wire, option, Answer.INVALID)
    elif name != export.encode():
        await _reply(wire, option, Answer.UNKNOWN)
    else:
        await _reply(wire, option, Answer.INFO, struct.pack(">HQH", INFO_EXPORT, *await facts()))
        await _reply(wire, option, Answer.ACK)
        return True
    return False


def _name_in(data: bytes) -> bytes | None:
    """Return the name in the data of INFO or GO; None if they are not well formed."""
    if len(data) < 6:
        return None
    (length,) = struct.unpack_from(">I", data)
    if length > len(data) - 6:
        return None
    (count,) = struct.unpack_from(">H", data, 4 + length)
    return data[4 : 4 + length] if len(data) == 6 + length + 2 * count else None


async def _read_option(wire: Wire) -> tuple[int, bytes]:
    head = await _read(wire, 16)
    option, length = struct.unpack(">II", head[8:])
    if head[:8] != OPTION_MAGIC:
        raise Unwelcome("it does not speak NBD")
    if length > _LONGEST_OPTION_BYTES:
        raise Unwelcome(f"{length} bytes are too many for an option")
    return option, await _read(wire, length)


async def _read(wire: Wire, count: int) -> bytes:
    async with asyncio.timeout(READ_S):
        return await wire.readexactly(count)


async def _reply(wire: Wire, option: int, kind: int, data: bytes = b"") -> None:
    await wire.write(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data)
