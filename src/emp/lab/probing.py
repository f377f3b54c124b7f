"""Runs what a client does in the client's place and reads its figures; ``prober`` and ``loads`` say what they mean."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from emp.lab import scan
from emp.lab.state import LabFiles
from emp.lab.topology import CLIENT
from emp.lab.verbs import command_in
from emp.model.errors import HostError

END_S = 10.0


class ClientProgram:
    """``with ClientProgram(files, "emp.lab.loads", ["bulk", "10.77.1.0"]) as load:`` runs from then on.

    Raises ``HostError`` if it dies, or says what it should not.
    """

    def __init__(self, files: LabFiles, module: str, words: Sequence[str]) -> None:
        self._module = module
        self._argv = command_in(files, CLIENT.name, [sys.executable, "-m", module, *words])

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
        """End it, wait for replies on their way, and return the report."""
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
            raise HostError(f"{self._module} in the client has died") from None

    def _expect(self, line: str) -> None:
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        if said != line:
            raise HostError(f"{self._module} in the client said {said!r} instead of {line!r}")


class Probing(ClientProgram):
    """``with Probing(files, {"evm": "10.77.1.0"}) as probing:`` sends from then on; ``mark`` begins a window.

    ``grace_s``: the end waits so long for replies; one that is still on its way then counts as lost.
    """

    def __init__(
        self,
        files: LabFiles,
        targets: Mapping[str, str],
        *,
        rate_hz: float = 1000,
        udp_only: bool = False,
        grace_s: float = 0.5,
    ) -> None:
        words = [f"{name}={address}" for name, address in targets.items()]
        words += ["--rate", str(rate_hz), "--grace", str(grace_s), *(["--udp-only"] if udp_only else [])]
        super().__init__(files, "emp.lab.prober", words)


def window(report: dict[str, Any], target: str, name: str) -> dict[str, Any]:
    """Return the UDP figures of one window of one target."""
    found: dict[str, Any] = next(part for part in report["targets"][target]["udp"]["windows"] if part["name"] == name)
    return found
