"""``python -m emp.controller --config FILE``: see ``emp.controller.config`` for the file."""

from __future__ import annotations

import sys
from pathlib import Path

from emp.controller import daemon
from emp.controller.config import Config
from emp.wire import process
from emp.wire.config import read_config


async def run(path: Path) -> None:
    await daemon.run(read_config(Config, path))


def main() -> int:
    return process.main("emp controller", "The pool's daemon.", run)


if __name__ == "__main__":
    sys.exit(main())
