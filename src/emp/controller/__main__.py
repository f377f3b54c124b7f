"""``python -m emp.controller --config FILE``: see ``emp.controller.config`` for the file."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from emp.controller.config import load_config
from emp.controller.daemon import run
from emp.model.errors import EmpError


def main() -> int:
    """Return the exit code: 0 after SIGTERM or SIGINT, else that of the error that is on stderr."""
    parser = argparse.ArgumentParser(prog="emp.controller", description="The pool's daemon.")
    parser.add_argument("--config", type=Path, required=True, help="JSON file")
    parser.add_argument("--verbose", action="store_true", help="log more")
    options = parser.parse_args()
    level = logging.DEBUG if options.verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname).1s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.getLogger("httpcore2").setLevel(logging.WARNING)
    try:
        asyncio.run(run(load_config(options.config)))
    except EmpError as error:
        print(f"emp.controller: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
