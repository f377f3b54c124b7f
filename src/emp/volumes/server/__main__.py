"""Run the volume service: ``python -m emp.volumes.server --config FILE``. SIGTERM ends it and every export.

``{"address": "10.77.0.9", "port": 7445, "nbd_ports": [10809, 10999], "credentials": DIR, "state_dir": DIR, "pool": P}``
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path

from emp.model.errors import BadInput, EmpError
from emp.volumes.server.app import make_app
from emp.volumes.server.config import Config
from emp.volumes.server.service import VolumeService
from emp.wire.pki import Credentials
from emp.wire.serve import Listener, Server
from emp.wire.sockets import listen
from emp.wire.tls import mutual_server

log = logging.getLogger("emp.volumes.server")


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT."""
    credentials = Credentials.load(config.credentials)
    if credentials.pool != config.pool:
        raise BadInput(f"the credentials are of the pool {credentials.pool}, not {config.pool}", field="credentials")
    over = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, over.set)
    app = make_app(VolumeService(config, credentials))
    with listen(config.address, config.port, field="port") as socket:
        async with Server(app, [Listener(socket, mutual_server(config.credentials))], pool=config.pool):
            log.info("%s serves volumes at %s port %d", credentials.identity, config.address, config.port)
            await over.wait()
    log.info("ended")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m emp.volumes.server", description="The pool's volume service.")
    parser.add_argument("--config", required=True, type=Path, help="JSON file with the settings")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(serve(Config.load(parser.parse_args(argv).config)))
    except EmpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
