"""Everything that the API serves from, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from emp.controller.book import Book
from emp.controller.console import Consoles
from emp.controller.efs import Efs
from emp.controller.evms import Evms
from emp.controller.fences import Fences
from emp.controller.learnt import LearntAddresses
from emp.controller.metrics import Metrics
from emp.controller.migrations import Migrations
from emp.controller.nodes import Nodes
from emp.controller.volumes import Volumes
from emp.wire.secret import Secret


@dataclass(frozen=True)
class Services:
    pool: str
    token: Secret
    heartbeat_s: float
    book: Book
    nodes: Nodes
    volumes: Volumes
    efs: Efs
    fences: Fences
    evms: Evms
    migrations: Migrations
    learnt: LearntAddresses
    consoles: Consoles
    metrics: Metrics
