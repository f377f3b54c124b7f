"""Reading a sector of an NBD export under TLS, to see that this node reaches it; asking how large one is.

The connection is kept: a probe a second costs one small read, and a handshake only after a break.
"""

from __future__ import annotations

import asyncio
import ssl

from emp.model.errors import Refused, Unreachable
from emp.model.volume import NbdEndpoint
from emp.volumes.nbd_wire import REPLY, REPLY_MAGIC, Kind, NoSuchExport, Stream, open_tls, pack_request, say_goodbye

SECTOR_BYTES = 512
TIMEOUT_S = 5.0


async def export_size_bytes(endpoint: NbdEndpoint, tls: ssl.SSLContext) -> int:
    """Return how large an export is, by its server's word.

    Raise ``Unreachable``; ``Refused`` for what no node could open either: no such export, or a certificate that the
    pool's CA does not vouch for under that name.
    """
    to, where = endpoint, f"{endpoint.host} port {endpoint.port}"
    try:
        async with asyncio.timeout(TIMEOUT_S):
            opened = await open_tls(to.host, to.port, export=to.export, tls=tls, tls_hostname=to.tls_hostname)
    except NoSuchExport as error:
        hint = "see which exports the server has"
        raise Refused(f"{where} has no export {to.export!r}", field="url", hint=hint) from error
    except ssl.SSLCertVerificationError as error:
        hint = f"it takes one of the pool's CA for {to.tls_hostname}"
        message = f"the certificate of {where} is not believed: {error.verify_message}"
        raise Refused(message, field="url", hint=hint) from error
    except (OSError, EOFError, TimeoutError) as error:
        reason = str(error) or f"no answer in {TIMEOUT_S:g} s"
        raise Unreachable(f"cannot open {to.export} at {where}: {reason}", field="url") from error
    say_goodbye(opened.stream)
    return opened.size_bytes


class NbdProbe:
    """See ``emp.volumes.base.VolumeProbe``. ``tls`` shows this agent's certificate, which the export admits."""

    def __init__(self, endpoint: NbdEndpoint, tls: ssl.SSLContext) -> None:
        self._endpoint = endpoint
        self._tls = tls
        self._stream: Stream | None = None
        self._reads = 0

    async def read(self) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                self._stream = self._stream or await self._connect()
                await self._read_sector(self._stream)
        except (OSError, EOFError, TimeoutError) as error:
            self._drop()
            where = f"{self._endpoint.export} at {self._endpoint.host} port {self._endpoint.port}"
            reason = str(error) or f"no answer in {TIMEOUT_S:g} s"
            raise Unreachable(f"cannot read {where}: {reason}", hint="see whether the volume server runs") from error
        except BaseException:
            self._drop()
            raise

    async def close(self) -> None:
        if self._stream is not None:
            say_goodbye(self._stream)
            self._stream = None

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.abort()
            self._stream = None

    async def _connect(self) -> Stream:
        to = self._endpoint
        opened = await open_tls(to.host, to.port, export=to.export, tls=self._tls, tls_hostname=to.tls_hostname)
        return opened.stream

    async def _read_sector(self, stream: Stream) -> None:
        self._reads += 1
        stream.send(pack_request(Kind.READ, self._reads, length=SECTOR_BYTES))
        magic, code, cookie = REPLY.unpack(await stream.readexactly(REPLY.size))
        if (magic, cookie) != (REPLY_MAGIC, self._reads):
            raise OSError("it does not speak NBD")
        if code:
            raise OSError(f"it answers with error {code}")
        await stream.readexactly(SECTOR_BYTES)
