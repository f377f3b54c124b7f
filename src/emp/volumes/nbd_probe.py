"""Reading a sector of an NBD export under TLS, to see that this node reaches it (NBD's doc/proto.md, fixed newstyle).

The connection is kept: a probe a second costs one small read, and a handshake only after a break.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct

from emp.model.errors import Unreachable
from emp.model.volume import NbdEndpoint

SECTOR_BYTES = 512
TIMEOUT_S = 5.0
_GREETING = b"NBDMAGICIHAVEOPT"
_OPTION = b"IHAVEOPT"
_OPTION_REPLY = 0x3E889045565A9
_STARTTLS, _GO = 5, 7
_ACK, _INFO = 1, 3
_REQUEST, _SIMPLE_REPLY = 0x25609513, 0x67446698
_READ, _DISCONNECT = 0, 2
_CLIENT_FLAGS = 3
"""fixed newstyle, no zeroes"""

_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class NbdProbe:
    """See ``emp.volumes.base.VolumeProbe``. ``tls`` shows this agent's certificate, which the export admits."""

    def __init__(self, endpoint: NbdEndpoint, tls: ssl.SSLContext) -> None:
        self._endpoint = endpoint
        self._tls = tls
        self._streams: _Streams | None = None
        self._reads = 0

    async def read(self) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                self._streams = self._streams or await self._connect()
                await self._read_sector(*self._streams)
        except (OSError, EOFError, TimeoutError, struct.error) as error:
            self._drop()
            where = f"{self._endpoint.export} at {self._endpoint.host} port {self._endpoint.port}"
            reason = str(error) or f"no answer in {TIMEOUT_S:g} s"
            raise Unreachable(f"cannot read {where}: {reason}", hint="see whether the volume server runs") from error
        except BaseException:
            self._drop()
            raise

    async def close(self) -> None:
        if self._streams is not None:
            _, writer = self._streams
            with contextlib.suppress(OSError):
                writer.write(struct.pack(">IHHQQI", _REQUEST, 0, _DISCONNECT, 0, 0, 0))
            self._drop()

    def _drop(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _connect(self) -> _Streams:
        reader, writer = await asyncio.open_connection(self._endpoint.host, self._endpoint.port)
        try:
            if await reader.readexactly(len(_GREETING)) != _GREETING:
                raise OSError("no NBD server answers there")
            await reader.readexactly(2)
            writer.write(struct.pack(">I", _CLIENT_FLAGS))
            await self._option(reader, writer, _STARTTLS)
            await writer.start_tls(self._tls, server_hostname=self._endpoint.tls_hostname)
            name = self._endpoint.export.encode()
            await self._option(reader, writer, _GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
        except BaseException:
            writer.transport.abort()
            raise
        return reader, writer

    @staticmethod
    async def _option(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, option: int, data: bytes = b""
    ) -> None:
        writer.write(_OPTION + struct.pack(">II", option, len(data)) + data)
        while True:
            magic, _, kind, length = struct.unpack(">QIII", await reader.readexactly(20))
            said = await reader.readexactly(length)
            if magic != _OPTION_REPLY or kind not in (_ACK, _INFO):
                raise OSError(f"refused ({kind:#x}): {said.decode(errors='replace')}")
            if kind == _ACK:
                return

    async def _read_sector(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reads += 1
        writer.write(struct.pack(">IHHQQI", _REQUEST, 0, _READ, self._reads, 0, SECTOR_BYTES))
        magic, code, cookie = struct.unpack(">IIQ", await reader.readexactly(16))
        if (magic, cookie) != (_SIMPLE_REPLY, self._reads):
            raise OSError("it does not speak NBD")
        if code:
            raise OSError(f"it answers with error {code}")
        await reader.readexactly(SECTOR_BYTES)
