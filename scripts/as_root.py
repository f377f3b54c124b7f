"""``python scripts/as_root.py WHY COMMAND...``: become COMMAND, as root; through sudo where needed, saying why."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from emp_setup.console import Refusal, refuse, say
from emp_setup.privilege import as_root


def main(why: str, *command: str) -> NoReturn:
    """Replace this process by ``command``."""
    try:
        rootly = as_root(command, why)
    except Refusal as refusal:
        sys.exit(refuse(refusal))
    if rootly[0] == "sudo":
        say(f"using sudo: {why}")
    os.execvp(rootly[0], rootly)


if __name__ == "__main__":
    main(*sys.argv[1:])
