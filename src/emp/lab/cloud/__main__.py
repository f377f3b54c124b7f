"""Run the simulated cloud: ``python -m emp.lab.cloud --config FILE``. SIGTERM ends it and every export.

``{"address": "10.77.0.3", "port": 7450, "nbd_ports": [10900, 12000], "credentials": DIR, "state_dir": DIR, "pool": P,
"access_key": "AKIA...", "nodes": {"n1": {"instance": "i-...", "zone": "lab-1a"}}}``
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path

from emp.lab.cloud.config import CloudConfig
from emp.lab.cloud.daemon import serving
from emp.model.errors import EmpError

log = logging.getLogger("emp.lab.cloud")


async def serve(config: CloudConfig) -> None:
    """Serve until SIGTERM or SIGINT."""
    over = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, over.set)
    async with serving(config):
        log.info("serves %d instances at %s port %d", len(config.nodes), config.address, config.port)
        await over.wait()
    log.info("ended")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m emp.lab.cloud", description="A simulated cloud of block volumes.")
    parser.add_argument("--config", required=True, type=Path, help="JSON file, written by emp lab up")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(serve(CloudConfig.load(parser.parse_args(argv).config)))
    except EmpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
