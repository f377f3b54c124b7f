"""Faults between agents and QEMUs, as a test asks for them: see ``qmp_proxy`` for where they happen.

::

    qemu = install(directory)                       # once; make the lab with EMP_QEMU=qemu
    faults = QmpFaults.of_place(files, "n2")        # or QmpFaults(directory) outside of a lab
    held = faults.hold("command", "cont", evm="web")
    held.wait()                                     # it is there, and QEMU has not got it
    held.release()                                  # or held.drop()
    faults.drop("reply", "migrate", times=1)
    faults.duplicate("event", "RESUME")
    faults.clear()

A rule may be put before the QEMU that it is for exists.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from emp.lab import places
from emp.lab.state import LabFiles
from tests.fault import qmp_proxy
from tests.fault.qmp_proxy import RULES, Entry, Message, Rule

IN_A_PLACE = Path("/run/qmp-faults")
"""where the rules are looked up: in a lab each node has its own /run"""
PATIENCE_S = 60.0
_numbers = itertools.count(1)


def install(directory: Path, *, qemu: str = "qemu-system-x86_64", rules: Path = IN_A_PLACE) -> Path:
    """Write into ``directory`` a QEMU whose monitors pass through the proxy, and return its path.

    QEMU's users must be able to read ``directory``.
    """
    found = shutil.which(qemu)
    assert found is not None, f"there is no {qemu}"
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    proxy = directory / "qmp_proxy.py"
    shutil.copy(qmp_proxy.__file__, proxy)
    words = [anybodys_python(), "-I", "-S", str(proxy), os.path.realpath(found), str(rules)]
    script = directory / "qemu-system-x86_64"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    for path, mode in ((proxy, 0o644), (script, 0o755)):
        path.chmod(mode)
    return script


def anybodys_python() -> str:
    """Return a Python that QEMU's users can run: ours may lie in a home directory of root's."""
    for candidate in (Path(os.path.realpath(sys.executable)), Path("/usr/bin/python3")):
        if candidate.exists() and all(path.stat().st_mode & 1 for path in (candidate, *candidate.parents)):
            return str(candidate)
    pytest.fail("no Python here may be run by everybody: install the package python3")


@dataclass(frozen=True)
class Fault:
    """One rule that is in force until it is removed."""

    faults: QmpFaults
    rule: Rule

    def entries(self) -> list[Entry]:
        """Return what was done by it so far."""
        return [entry for entry in self.faults.log() if entry["rule"] == self.rule["id"] and entry["what"] != "passed"]

    def wait(self, times: int = 1, *, timeout_s: float = PATIENCE_S) -> list[Entry]:
        """Return once it has acted so many times."""
        deadline = time.monotonic() + timeout_s
        while len(found := self.entries()) < times:
            assert time.monotonic() < deadline, f"not met within {timeout_s:.0f} s: {self.rule}"
            time.sleep(0.005)
        return found

    def release(self) -> None:
        """End the rule; what it holds passes."""
        self.faults.replace(self.rule, None)

    def drop(self) -> None:
        """Drop what it holds and, from now on, what would be held."""
        self.faults.replace(self.rule, {**self.rule, "action": "drop"})


class QmpFaults:
    """The rules and the log of the QEMUs of one node."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o1777)  # each QEMU has a user of its own
        self._rules: list[Rule] = []

    @classmethod
    def of_place(cls, files: LabFiles, where: str) -> QmpFaults:
        """Return those of a node of a lab that was made with the installed QEMU; its earlier rules are forgotten."""
        made = cls(Path(f"/proc/{places.init_of(files, where).pid}/root{IN_A_PLACE}"))
        made.clear()
        return made

    def hold(self, kind: str, name: str, **where: object) -> Fault:
        """Hold messages until the fault is released; others pass them by. ``where``: fields of ``Rule``."""
        return self._put("hold", kind, name, where)

    def drop(self, kind: str, name: str, **where: object) -> Fault:
        """Lose messages: a command is not carried out, a reply to one that was is not heard."""
        return self._put("drop", kind, name, where)

    def duplicate(self, kind: str, name: str, **where: object) -> Fault:
        """Deliver messages twice; of a command that is carried out twice, one reply is heard."""
        return self._put("duplicate", kind, name, where)

    def _put(self, action: str, kind: str, name: str, where: dict[str, object]) -> Fault:
        rule: Rule = {
            "id": f"{os.getpid()}-{next(_numbers)}", "action": action, "kind": kind, "name": name, "evm": None,
            "monitor": None, "fields": {}, "skip": 0, "times": None,
        }  # fmt: skip
        unknown = where.keys() - rule.keys()
        assert not unknown, f"a rule has no {unknown}"
        rule.update(where)  # type: ignore[typeddict-item]  # checked above
        self._rules.append(rule)
        self._write()
        return Fault(self, rule)

    def replace(self, rule: Rule, by: Rule | None) -> None:
        others = [one for one in self._rules if one["id"] != rule["id"]]
        self._rules = [*others, by] if by else others
        self._write()

    def clear(self) -> None:
        """End every rule; what is held passes."""
        self._rules = []
        self._write()

    def _write(self) -> None:
        draft = self.directory / f".{RULES}.new"
        draft.write_text(json.dumps(self._rules))
        draft.chmod(0o644)
        draft.replace(self.directory / RULES)

    def log(self) -> list[Entry]:
        """Return all that passed the monitors of this node, in order."""
        found: list[Entry] = []
        for path in self.directory.glob("log-*.jsonl"):
            whole = path.read_text().rpartition("\n")[0]  # the last line may be half written
            found += (json.loads(line) for line in whole.splitlines())
        return sorted(found, key=lambda entry: entry["at_s"])

    def messages(self, kind: str, name: str, what: str = "passed") -> list[Message]:
        """Return the messages of a kind and name to which ``what`` was done."""
        return [one["message"] for one in self.log() if (one["kind"], one["name"], one["what"]) == (kind, name, what)]
