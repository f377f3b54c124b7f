"""Run the volume service: ``python -m emp.volumes.server --config FILE``. SIGTERM ends it and every export.

``{"address": "10.77.0.9", "port": 7445, "nbd_ports": [10809, 10999], "credentials": DIR, "state_dir": DIR, "pool": P}``
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from emp.volumes.server.app import make_app
from emp.volumes.server.config import Config
from emp.volumes.server.service import VolumeService
from emp.wire import process
from emp.wire.config import read_config
from emp.wire.pki import Credentials
from emp.wire.process import told_to_end
from emp.wire.serve import Listener, Server
from emp.wire.sockets import listen
from emp.wire.tls import mutual_server

log = logging.getLogger("emp.volumes.server")


async def serve(path: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    config = read_config(Config, path)
    credentials = Credentials.load(config.credentials, of_pool=config.pool)
    over = told_to_end()
    app = make_app(VolumeService(config, credentials))
    with listen(config.address, config.port, field="port") as socket:
        async with Server(app, [Listener(socket, mutual_server(config.credentials))], pool=config.pool):
            log.info("%s serves volumes at %s port %d", credentials.identity, config.address, config.port)
            await over.wait()
    log.info("ended")


def main(arguments: Sequence[str] | None = None) -> int:
    return process.main("python -m emp.volumes.server", "The pool's volume service.", serve, arguments)


if __name__ == "__main__":
    sys.exit(main())
