"""Runs the client-side checker in the client's place and reads its figures: see ``prober`` for what they mean."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from emp.lab import scan
from emp.lab.state import LabFiles
from emp.lab.topology import CLIENT
from emp.lab.verbs import command_in
from emp.model.errors import HostError

END_S = 10.0


class Probing:
    """``with Probing(files, {"evm": "10.77.1.0"}) as probing:`` sends from then on; ``mark`` begins a window."""

    def __init__(self, files: LabFiles, targets: Mapping[str, str], *, rate_hz: int = 1000) -> None:
        words = [f"{name}={address}" for name, address in targets.items()]
        self._argv = command_in(
            files, CLIENT.name, [sys.executable, "-m", "emp.lab.prober", *words, "--rate", str(rate_hz)]
        )

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._expect("ready")
        return self

    def mark(self, name: str) -> None:
        """Begin a new window; what is sent from now on counts there."""
        self._say(f"mark {name}")
        self._expect(f"marked {name}")

    def stop(self) -> dict[str, Any]:
        """End the streams, wait for replies on their way, and return the report."""
        self._say("stop")
        output, _ = self._process.communicate(timeout=END_S)
        report: dict[str, Any] = json.loads(output)
        return report

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            # The process that we started is nsenter's; what it runs in the place would outlive it.
            scan.kill(scan.children(self._process.pid))
        self._process.communicate()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise HostError("the client's prober has died") from None

    def _expect(self, line: str) -> None:
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        if said != line:
            raise HostError(f"the client's prober said {said!r} instead of {line!r}")


def window(report: dict[str, Any], target: str, name: str) -> dict[str, Any]:
    """Return the UDP figures of one window of one target."""
    found: dict[str, Any] = next(part for part in report["targets"][target]["udp"]["windows"] if part["name"] == name)
    return found
