"""What a search looks at: three nodes, a controller, messages on their way, and the faults that may still happen.

A world is a frozen value of small numbers (``project.Table``), so that a million of them can be compared. Messages stay
deliverable for ever once sent: late, twice or never. QEMU is what was measured of it (the design's facts).
"""

from __future__ import annotations

from typing import NamedTuple

from emp.model.migration import Outcome

NODES = "ABC"


class Faults(NamedTuple):
    """How many of each may still happen."""

    kill: int = 0
    """agents killed, between any two actions"""
    gone: int = 0
    """agents that die and never come back"""
    die: int = 0
    """QEMUs that die"""
    stream: int = 0
    """streams that break: by the network, or by the guard's yank, at any time before ``completed``"""
    write: int = 0
    """journal writes that fail, with the record on disk or not"""
    refuse: int = 0
    """a ``cont`` that QEMU refuses"""
    reply: int = 0
    """a ``cont`` without an answer"""
    link: int = 0
    """links between the agents that are lost"""
    cut: int = 0
    """nodes that lose each other for good, and not the controller"""
    io: int = 0
    """guests stopped by an error of their storage"""
    halt: int = 0
    """guests that shut themselves down"""
    make: int = 0
    """machines that cannot be made"""
    order: int = 0
    """orders of the controller without an answer"""
    silent: int = 0
    """nodes that the controller takes for lost"""
    abort: int = 0
    """aborts asked for, deadlines passed"""
    controller: int = 0
    """controllers killed"""
    cold: int = 0
    """cold restarts ordered, at any time"""
    journal: int = 0
    """journals lost, and known to be lost"""
    rollback: int = 0
    """journals that have lost GIVEN, and are not known to have, beside a QEMU that lives"""
    reboot: int = 0
    """hosts that reboot with a journal behind by one record, and not known to be"""
    image: int = 0
    """node A back from the disk image of its first day"""


class Qemu(NamedTuple):
    made: int
    """for which migration and attempt (ten times the one plus the other); 0: booted"""
    status: str
    """source: run, copy, pre, dev, comp, iostop, halt; target: inc, late, load, refused, cont (in its socket), run"""
    stale: bool
    """older than what another copy has run since"""
    epoch: int
    """that its volumes are attached under"""
    to: int = 0
    """the target's QEMU that it streams to"""
    relayed: int = 0
    """the migration whose target may write to this node's volumes through its relay"""


class Busy(NamedTuple):
    """A role that an agent holds in memory."""

    m: int
    state: int
    inbox: tuple[int, ...] = ()
    """events that it has not looked at yet, in order"""
    timers: int = 0
    """bits of ``TIMERS``"""


class Node(NamedTuple):
    up: bool
    """its agent runs"""
    book: int
    """the ledger as the agent knows it"""
    disk: int
    """the ledger as a restart would find it: after a failed write it may say more"""
    roles: tuple[Busy, ...] = ()
    qemu: Qemu | None = None
    port: bool = False
    off: bool = False
    """fenced: cut off from every volume and every address"""
    lost: bool = False
    """its journal is lost and it is in quarantine"""
    gone: bool = False
    """its agent never comes back: what is left is QEMU and the guard"""
    suspect: bool = False
    """its journal has been proven wrong: it takes no orders and answers nothing from it"""


class Plan(NamedTuple):
    source: int
    target: int
    epoch_target: int
    epoch_source: int


class Cold(NamedTuple):
    """A cold restart under way: every node that could hold authority is retired or fenced first."""

    epoch: int
    on: int
    pending: tuple[int, ...]
    begun: bool = False


class Controller(NamedTuple):
    owner: tuple[int, int]
    """node and epoch, as last attested"""
    plans: tuple[Plan, ...] = ()
    open: int = 0
    """the migration under way, counted from 1"""
    supervisor: int = 0
    asked: int = 0
    """orders on their way: 1 prepare, 2 hand over"""
    watched: int = 0
    """ends that are watched: 1 source, 2 target"""
    waiting: tuple[int, ...] = ()
    """aborts that wait for the order which they would undo"""
    nonce: int = 0
    """the target's, once it is on record"""
    next_epoch: int = 2
    ends: tuple[Outcome, ...] = ()
    """of the migrations that are closed"""
    cut: bool = False
    """no word, and no stream, gets from one node to another any more: what the agents need, the controller carries"""
    holders: tuple[int, ...] = (0,)
    """nodes that could hold authority (rule R8)"""
    cold: Cold | None = None


class World(NamedTuple):
    nodes: tuple[Node, Node, Node]
    c: Controller
    messages: frozenset[int] = frozenset()
    left: Faults = Faults()
    given: int = 0
    """bits of the migrations whose GIVEN has been on disk"""
    floor: int = 0
    """the volume server lets no older epoch through"""


def busy(node: Node, m: int) -> Busy | None:
    for role in node.roles:
        if role.m == m:
            return role
    return None


def with_role(node: Node, role: Busy) -> Node:
    others = tuple(r for r in node.roles if r.m != role.m)
    return node._replace(roles=tuple(sorted((*others, role))))


def fenced(w: World, i: int) -> bool:
    node = w.nodes[i]
    return node.off or (node.qemu is not None and node.qemu.epoch < w.floor)


def put(w: World, i: int, node: Node) -> World:
    a, b, c = w.nodes
    nodes = (node, b, c) if i == 0 else (a, node, c) if i == 1 else (a, b, node)
    return World(nodes, w.c, w.messages, w.left, w.given, w.floor)


def with_qemu(w: World, i: int, qemu: Qemu | None) -> World:
    return put(w, i, w.nodes[i]._replace(qemu=qemu))


def spent(w: World, fault: str) -> World:
    return w._replace(left=w.left._replace(**{fault: getattr(w.left, fault) - 1}))


def runs(w: World, i: int) -> World:
    """The copy of node ``i`` starts to run: unless it is fenced, every other is older than the disk from now on."""
    nodes = list(w.nodes)
    qemu = nodes[i].qemu
    assert qemu is not None
    nodes[i] = nodes[i]._replace(qemu=qemu._replace(status="run", to=0))
    if not fenced(w, i):
        for j, other in enumerate(nodes):
            if j != i and other.qemu and not other.qemu.stale and other.qemu.status != "inc":
                nodes[j] = other._replace(qemu=other.qemu._replace(stale=True))
    a, b, c = nodes
    return w._replace(nodes=(a, b, c))
