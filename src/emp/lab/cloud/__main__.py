"""Run the simulated cloud: ``python -m emp.lab.cloud --config FILE``. SIGTERM ends it and every export.

``{"address": "10.77.0.3", "port": 7450, "nbd_ports": [10900, 12000], "credentials": DIR, "state_dir": DIR, "pool": P,
"access_key": "AKIA...", "nodes": {"n1": {"instance": "i-...", "zone": "lab-1a"}}}``
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from emp.lab.cloud.config import CloudConfig
from emp.lab.cloud.daemon import serving
from emp.wire import process
from emp.wire.config import read_config
from emp.wire.process import told_to_end

log = logging.getLogger("emp.lab.cloud")


async def serve(path: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    config = read_config(CloudConfig, path)
    over = told_to_end()
    async with serving(config):
        log.info("serves %d instances at %s port %d", len(config.nodes), config.address, config.port)
        await over.wait()
    log.info("ended")


def main(arguments: Sequence[str] | None = None) -> int:
    return process.main("python -m emp.lab.cloud", "A simulated cloud of block volumes.", serve, arguments)


if __name__ == "__main__":
    sys.exit(main())
