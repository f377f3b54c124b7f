"""What must never happen, each by its number in the protocol (I1 .. I9), and which end must always stay in reach.

Each takes the world before a move and after it, and says what is wrong. ``good`` names the copies that the EVM could
still live on.
"""

from __future__ import annotations

from collections.abc import Callable

from emp.migration.records import OWNING, RecordKind
from emp.migration.states import SourcePhase
from tests.search.machines import EXECUTES
from tests.search.project import Core
from tests.search.world import World, fenced

K = RecordKind
Invariant = Callable[[Core, World, World], str | None]


def executes(w: World, i: int) -> bool:
    qemu = w.nodes[i].qemu
    return qemu is not None and qemu.status in EXECUTES


def starts(before: World, after: World, i: int) -> bool:
    return executes(after, i) and not executes(before, i)


def i1_one_copy_executes(_core: Core, _before: World, w: World) -> str | None:
    free = [i for i in range(3) if executes(w, i) and not fenced(w, i)]
    return "I1: two copies that are not fenced execute" if len(free) > 1 else None


def i2_no_stale_copy_runs(_core: Core, before: World, w: World) -> str | None:
    for i in range(3):
        qemu = w.nodes[i].qemu
        if qemu and qemu.stale and starts(before, w, i) and not fenced(w, i):
            return "I2: a copy runs that is older than the disk"
    return None


def i2_a_relay_serves_the_owner(_core: Core, before: World, w: World) -> str | None:
    """A relay outlives its machine: it is seen here only while that machine is."""
    for i in range(3):
        qemu = w.nodes[i].qemu
        if qemu is not None and qemu.relayed:
            if not w.given & 1 << qemu.relayed:
                return "I2: a target writes through a relay before GIVEN"
            if starts(before, w, i) and not fenced(w, i):
                return "I2: the source's guest runs beside a relay that lets the target write"
    return None


def i3_the_last_copy_is_kept(core: Core, before: World, w: World) -> str | None:
    """Only QEMU's own death, a fence and RETIRE(k) may take the last good copy (checked for moves of agents)."""
    for then, now in zip(before.nodes, w.nodes, strict=True):
        if then.lost and then.qemu and then.qemu.status == "run" and now.qemu is None:
            return "I3: an agent kills a machine of which its journal knows nothing"
    if before.c.cold is None and good(core, before) and not _copies(core, w):
        return "I3: an agent destroys the last good copy"
    return None


def i5_one_port_is_open(core: Core, _before: World, w: World) -> str | None:
    for node in w.nodes:
        if node.port and core.kind(node.disk) in (None, K.PREPARED, K.WITHDRAWN, K.RETIRED) and not node.lost:
            return "I5: a port is open on a node that does not own the EVM"
    return None


def i6_no_target_runs_before_the_commit(_core: Core, _before: World, w: World) -> str | None:
    for i in range(3):
        qemu = w.nodes[i].qemu
        if qemu and qemu.made and executes(w, i) and not w.given & 1 << qemu.made // 10:
            return "I6: the target runs before GIVEN"
    return None


def i7_no_running_evm_loses_its_volumes(_core: Core, before: World, w: World) -> str | None:
    if w.c.cold is not None or w.left.cold != before.left.cold:
        return None
    for i in range(3):
        qemu = before.nodes[i].qemu
        running = qemu is not None and not qemu.stale and executes(before, i) and executes(w, i)
        if running and not fenced(before, i) and fenced(w, i):
            return "I7: the volumes of a running EVM are taken away"
        now = w.nodes[i].qemu
        if now is not None and now.epoch < 0 and starts(before, w, i):
            return "I7: the EVM starts without its volumes"
    return None


def i9_one_owner(core: Core, _before: World, w: World) -> str | None:
    """At most one journal that counts says that the EVM's authority is there, and no epoch was ever two nodes'."""
    owners = 0
    for node in w.nodes:
        last = core.last(node.disk)
        if last and last.kind in OWNING and not node.off and not node.lost and last.epoch >= w.floor:
            asks = last.kind is K.HANDOVER and (not node.up or any(_asks(core, role.state) for role in node.roles))
            first_day = node.qemu is None and last.epoch == 1
            owners += not asks and not first_day
    if owners > 1:
        return "I9: two journals own the EVM"
    owned = [core.owned(node.disk) for node in w.nodes]
    if owned[0] & owned[1] or owned[0] & owned[2] or owned[1] & owned[2]:
        return "I9: two nodes have owned the same epoch"
    return None


def _asks(core: Core, state: int) -> bool:
    return core.phase(state) in (SourcePhase.ASKING, SourcePhase.OVERRULED)


def r11_the_record_is_true(core: Core, _before: World, w: World) -> str | None:
    """Once a migration is closed, the EVM is where the record has it, and nothing moves it any more."""
    if w.c.open or w.c.cold is not None:
        return None
    for i, node in enumerate(w.nodes):
        if node.lost or node.off:
            continue
        kind = core.kind(node.disk)
        if i != w.c.owner[0] and kind in OWNING and (core.last(node.disk)).epoch > w.c.owner[1]:  # type: ignore[union-attr]
            return "R11: a migration was closed, and another node than the recorded one owns the EVM"
        if i == w.c.owner[0] and kind is K.GIVEN and _peer_kind(core, w, i) is not K.WITHDRAWN:
            return "R11: a migration was closed, and the recorded owner has given the EVM away"
    return None


OF_MOVES: tuple[Invariant, ...] = (
    i2_no_stale_copy_runs,
    i2_a_relay_serves_the_owner,
    i7_no_running_evm_loses_its_volumes,
)
OF_WORLDS: tuple[Invariant, ...] = (
    i1_one_copy_executes,
    i5_one_port_is_open,
    i6_no_target_runs_before_the_commit,
    i9_one_owner,
    r11_the_record_is_true,
)


def good(core: Core, w: World) -> list[int]:
    """Nodes with a copy that could run on without losing anything, and that nobody has had to give up.

    A target whose ``cont`` was refused withdraws: it cannot know that there is no other copy (rules R3, R4). And the
    one limit: ACTIVATED is on disk, and the target's copy has died before it ran. Then the source's may not run.
    """
    return [i for i in _copies(core, w) if not (_is_refused(w, i) or _is_given_for_good(core, w, i))]


def _is_refused(w: World, i: int) -> bool:
    qemu = w.nodes[i].qemu
    return qemu is not None and qemu.status == "refused"


def _is_given_for_good(core: Core, w: World, i: int) -> bool:
    return core.kind(w.nodes[i].disk) is K.GIVEN and _peer_kind(core, w, i) is K.ACTIVATED


def _copies(core: Core, w: World) -> list[int]:
    return [i for i in range(3) if _is_good(core, w, i)]


def _is_good(core: Core, w: World, i: int) -> bool:
    node = w.nodes[i]
    qemu = node.qemu
    if qemu is None or qemu.stale or qemu.status in ("inc", "late", "halt") or node.lost or fenced(w, i):
        return False
    kind = core.kind(node.disk)
    if kind is K.PREPARED:
        return _peer_kind(core, w, i) is K.GIVEN
    return kind in OWNING or kind is K.GIVEN


def _peer_kind(core: Core, w: World, i: int) -> RecordKind | None:
    """What the other end's journal says at last, as far as it knows, of this node's migration."""
    last = core.last(w.nodes[i].disk)
    assert last is not None and last.migration
    plan = w.c.plans[int(last.migration[1:]) - 1]
    other = w.nodes[plan.target if i == plan.source else plan.source]
    end = core.ledgers[other.book].end_of(last.migration)
    return end.kind if end else None


def must_run(core: Core, w: World) -> bool:
    """Some good copy has to come to run: not where a person has to look, or the agents that would do it are gone."""
    if any(node.lost for node in w.nodes):
        return False
    copies = good(core, w)
    gone = [i for i, node in enumerate(w.nodes) if node.gone]
    if not gone:
        return bool(copies)
    # I4: before ``completed`` the guard brings the source's guest back, whoever is gone
    return any((qemu := w.nodes[i].qemu) is not None and qemu.status in ("pre", "dev") for i in copies)


def runs_once(w: World) -> bool:
    return sum(executes(w, i) and not fenced(w, i) for i in range(3)) == 1


def at_rest(core: Core, w: World) -> bool:
    """I8: the record is closed, every role is over, and no machine is left but the one that runs, or none."""
    if w.c.open or w.c.cold is not None:
        return False
    for node in w.nodes:
        if not node.up or (node.qemu is not None and node.qemu.status != "run"):
            return False
        if any(not core.states[role.state].shown[0].final for role in node.roles):
            return False
    return sum(node.qemu is not None and not node.off for node in w.nodes) <= 1
