"""Every fault point of the daemons, derived from the types, routes and messages that make them, and what each is for.

A point belongs to the columns of the matrix in which a migration passes it (``matrix``). A step that is new in the
product has a point without a column, and ``test_points`` fails until somebody has thought about it.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

import emp.agent
from emp.agent.api import make_app as agent_app
from emp.agent.gate import Gate
from emp.faults import name_of
from emp.migration import events, supervisor
from emp.migration.records import RecordKind
from emp.model.orders import RolePhase
from emp.volumes.server.app import make_app as volumes_app
from emp.wire.points import PointRoute

# What a migration does in each column, as (before, after); each name is one step of the product.
_STEPS: dict[str, tuple[str, str]] = {
    "controller.attach": ("B", "B"),
    "controller.prepare": ("B", "B"),
    "controller.hand-over": ("B", "B"),
    "controller.watch-source": ("B", "B"),
    "controller.watch-target": ("B", "B"),
    "controller.record-owner-target": ("T", "T"),
    "controller.detach-source": ("T", "T"),
    "controller.close-completed": ("T", "T"),
    "target.make-machine": ("B", "B"),
    "target.write-record-prepared": ("B", "B"),
    "source.write-record-handover": ("B", "B"),
    "source.start-stream": ("B", "B"),
    "source.set-timer-deadline": ("B", "B"),
    "source.set-timer-blackout": ("P", "P"),
    "source.continue-stream": ("P", "D"),
    "target.send-loaded": ("D", "H"),
    "source.write-record-given": ("H", "M"),
    "source.send-go": ("M", "M"),
    "source.open-relays": ("M", "M"),
    "source.forward": ("M", "M"),
    "source.set-timer-repeat": ("M", "M"),
    "target.write-record-activated": ("M", "M"),
    "target.open-ports": ("M", "M"),
    "target.run": ("M", "T"),
    "target.announce": ("T", "T"),
    "target.send-answer-activated": ("T", "T"),
    "source.write-record-done": ("T", "T"),
    "source.kill-machine": ("T", "T"),
}
# Steps of the way back: they follow a fault, and belong to the columns from which that way leads.
_WAY_BACK: dict[str, str] = {
    "controller.abort-source": "BPDHM",
    "controller.abort-target": "BPDHM",
    "controller.record-owner-source": "BPDHM",
    "controller.detach-target": "BPDHM",
    "controller.close-aborted": "BPDHM",
    "controller.close-lost": "BPDHMT",
    "source.cancel-stream": "BPD",
    "source.write-record-own": "BPDHM",
    "source.send-aborted": "BPDHM",
    "source.await-guest": "BPD",
    "source.close-relays": "BPDHM",
    "source.take-back-frames": "BPDHM",
    "source.run": "HM",
    "target.kill-machine": "BPDHM",
    "target.write-record-withdrawn": "BPDHM",
    "target.block-ports": "M",
    "target.send-failed": "BPDH",
    "target.send-answer-withdrawn": "M",
    "target.set-timer-repeat": "HM",
    "controller.carry-go": "M",
    **{f"controller.carry-answer-{phase}": "M" for phase in RolePhase},
    "source.ask": "HM",
    "source.set-timer-answer": "HM",
    "source.set-timer-retry": "BPDHM",
    "source.claim-volumes": "BPDHM",
    "source.quarantine": "M",
    "target.ask": "HM",
    "target.claim-volumes": "T",
    "target.send-answer-going": "BPDH",
    "target.send-answer-waiting": "BPDHM",
    "target.set-timer-answer": "HM",
    "target.set-timer-retry": "M",
}
_LINK: dict[str, str] = {
    "link.ask": "HM", "link.loaded": "DH", "link.go": "M", "link.answer": "MT",
    "link.failed": "BPDH", "link.aborted": "BPDH", "link.health": "B",
    "link.addresses": "B", "link.tracked": "BP", "link.traffic": "M", "link.taken": "MT",
}  # fmt: skip
_RECORDS: dict[str, tuple[str, str]] = {
    "journal.own": ("BPDHM", "BPDHM"),
    "journal.handover": ("B", "B"),
    "journal.given": ("H", "M"),
    "journal.done": ("T", "T"),
    "journal.prepared": ("B", "B"),
    "journal.activated": ("M", "M"),
    "journal.withdrawn": ("BPDHM", "BPDHM"),
    "journal.retired": ("BPDHMT", "BPDHMT"),
    "journal.stopped": ("BPDHMT", "BPDHMT"),
}
_ORDERS: dict[str, str] = {
    "agent.go": "M", "agent.answer": "M", "volumes.claim": "BPDHMT",
    "agent.address_moved": "T", "agent.lend": "BT", "agent.take_back": "BPDHMT", "agent.hold": "T", "agent.go_on": "T",
    "agent.prepare": "B", "agent.hand_over": "B", "agent.abort": "BPDHMT", "agent.status": "BPDHMT",
    "agent.watch": "BPDHMT", "agent.start": "BPDHMT", "agent.stop": "BPDHMT", "agent.retire": "BPDHMT",
    "volumes.attach": "B", "volumes.detach": "BPDHMT", "volumes.fence": "BPDHMT",
}  # fmt: skip
# No part of a migration: asked at any time, and nothing follows from a lost answer.
_APART = {
    "agent.change_volumes", "agent.healthz", "agent.metrics", "agent.node", "agent.console_output",
    "agent.console_input", "volumes.resize",
    "volumes.list_volumes", "volumes.describe", "volumes.create", "volumes.delete",
}  # fmt: skip
# Steps that the other role takes, or that no state asks for: ``test_points`` sees to it that no daemon passes one.
_OTHERS = {
    "target.quarantine", "target.open-relays", "target.close-relays", "target.forward", "target.take-back-frames",
    "source.send-answer-going",
    "source.send-answer-waiting",
    *(f"source.{s}" for s in ("make-machine", "send-loaded", "send-failed", "open-ports", "block-ports", "announce",
      "send-answer-activated", "send-answer-withdrawn", "write-record-prepared", "write-record-activated",
      "write-record-withdrawn", "write-record-retired", "write-record-stopped")),
    *(f"target.{s}" for s in ("start-stream", "continue-stream", "cancel-stream", "send-go", "send-aborted",
      "await-guest", "set-timer-deadline", "set-timer-blackout", "write-record-own", "write-record-handover",
      "write-record-given", "write-record-done", "write-record-retired", "write-record-stopped")),
}  # fmt: skip


def columns() -> dict[str, str]:
    """Return point -> the columns it is assigned to; empty for one that is no part of a migration."""
    found: dict[str, str] = {}
    for name, (before, after) in _STEPS.items():
        found |= {f"{name}.before": before, f"{name}.after": after}
    for name, where in _WAY_BACK.items():
        found |= {f"{name}.before": where, f"{name}.after": where}
    for name, where in _LINK.items():
        found |= {f"{name}.send": where, f"{name}.receive": where}
    for name, (before, after) in _RECORDS.items():
        found |= {f"{name}.before_fsync": before, f"{name}.after_fsync": after}
    for name, where in {**_ORDERS, **dict.fromkeys(_APART, "")}.items():
        found |= {f"{name}.received": where, f"{name}.answered": where}
    for name in _OTHERS:
        found |= {f"{name}.before": "", f"{name}.after": ""}
    return found


# ---------------------------------------------------------------- what the product has


def points() -> Iterator[str]:
    """Yield every point that the product can pass, from its own types."""
    for role, step in itertools.product(("source", "target"), _names(get_args(events.Action))):
        yield from _around(f"{role}.{step}")
    for step in _names(get_args(supervisor.Action)):
        yield from _around(f"controller.{step}")
    for kind in RecordKind:
        yield f"journal.{kind}.before_fsync"
        yield f"journal.{kind}.after_fsync"
    for message in link_messages():
        yield f"link.{message}.send"
        yield f"link.{message}.receive"
    nothing = cast(Any, None)  # the apps are only looked at
    yield from _routes("agent", agent_app(nothing, nothing, nothing, nothing, Gate(), nothing))
    yield from _routes("volumes", volumes_app(cast(Any, _NoVolumes())), below="/v1")


class _NoVolumes:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the app is only looked at, yet it asks for {name}")


def _around(name: str) -> Iterator[str]:
    yield f"{name}.before"
    yield f"{name}.after"


def _routes(daemon: str, router: FastAPI | APIRouter, below: str = "/") -> Iterator[str]:
    for route in router.routes:
        if included := getattr(route, "original_router", None):
            yield from _routes(daemon, included, below)
        if isinstance(route, APIRoute) and route.path.startswith(below):
            assert isinstance(route, PointRoute), f"{daemon}: {route.path} has no points; give its router a route_class"
            yield f"{daemon}.{route.name}.received"
            yield f"{daemon}.{route.name}.answered"


def _names(kinds: Iterable[type]) -> Iterator[str]:
    """Yield the names of all values of these action types, one for each choice of their enumerations."""
    for kind in kinds:
        yield from dict.fromkeys(name_of(value) for value in _values(kind))


def _values(kind: type) -> Iterator[Any]:
    hints = get_type_hints(kind)
    options: list[list[Any]] = [
        list(hint) if isinstance(hint, type) and issubclass(hint, StrEnum)
        else list(_values(hint)) if is_dataclass(hint) and isinstance(hint, type)
        else [None]
        for hint in hints.values()
    ]  # fmt: skip
    for chosen in itertools.product(*options):
        yield kind(**dict(zip(hints, chosen, strict=True)))


def link_messages() -> set[str]:
    """Return the types of message that the agents' code names, but for those that are no business of the core."""
    found = set()
    for file in Path(emp.agent.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Dict):
                pairs: Iterable[tuple[Any, Any]] = zip(node.keys, node.values, strict=True)
            elif isinstance(node, ast.MatchMapping):
                pairs = [(key, getattr(p, "value", None)) for key, p in zip(node.keys, node.patterns, strict=True)]
            else:
                continue
            for key, value in pairs:
                if isinstance(key, ast.Constant) and key.value == "type" and isinstance(value, ast.Constant):
                    found.add(str(value.value))
    return found - {"hello", "clock"}
