"""What happens to a role of a migration (events), and what a role asks its daemon to do (actions).

An action whose result matters comes back as an event: ``WriteRecord`` as ``Written`` or ``WriteFailed``,
``ContinueStream`` as ``StreamMoved``, ``Run`` as ``GuestRuns``, ``RunRefused`` or ``RunUnknown``. A role never
assumes that an action worked.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from emp.migration.records import Record, RecordKind


class Stream(StrEnum):
    """What the migration stream came to, once both its statuses agree (``completed``, ``postmigrate``)."""

    PRE_SWITCHOVER = "pre-switchover"
    """source: the guest is paused, everything but the last pages and the device state has been sent"""
    COMPLETED = "completed"
    """source: sent and acknowledged; target: loaded, paused"""
    BROKEN = "broken"
    """failed or cancelled: the source's hypervisor resumes the guest by itself"""


class Word(StrEnum):
    """What the target answers to GO, always from its journal."""

    ACTIVATED = "activated"
    """it runs, or has run: the source's copy is stale for ever"""
    WITHDRAWN = "withdrawn"
    """it never ran and never will: the source may go back"""


class Timer(StrEnum):
    DEADLINE = "deadline"
    """of the source brownout"""
    BLACKOUT = "blackout"
    """of the blackout before the commit"""
    REPEAT = "repeat"
    """GO, or the question what became of it, is sent again"""


# ------------------------------------------------------------------ events


@dataclass(frozen=True)
class Ordered:
    """The controller's order has arrived: prepare (target) or hand over (source)."""


@dataclass(frozen=True)
class MachineReady:
    """Target: the machine waits for the stream."""

    pid: int
    start_ticks: int


@dataclass(frozen=True)
class MachineFailed:
    """Target: the machine could not be made."""

    reason: str


@dataclass(frozen=True)
class Written:
    """The record is on disk."""

    kind: RecordKind


@dataclass(frozen=True)
class WriteFailed:
    """It is not known to be on disk: nothing follows from that (rule R10)."""

    kind: RecordKind
    reason: str


@dataclass(frozen=True)
class StreamMoved:
    to: Stream
    reason: str | None = None


@dataclass(frozen=True)
class TargetLoaded:
    """Source: the target says that it has everything and stands paused."""

    nonce: str


@dataclass(frozen=True)
class TargetAnswered:
    """Source: the target's word, from its journal."""

    word: Word
    nonce: str


@dataclass(frozen=True)
class TargetFailed:
    """Source: the target says, before the commit, that it cannot take the EVM."""

    reason: str


@dataclass(frozen=True)
class GoArrived:
    """Target: the source has committed."""

    epoch: int
    nonce: str


@dataclass(frozen=True)
class SourceAborted:
    """Target: the source has gone back."""


@dataclass(frozen=True)
class GuestRuns:
    """The guest runs here (QEMU's word)."""


@dataclass(frozen=True)
class RunRefused:
    """The only ``cont`` sent was refused with an error: the guest did not run."""

    reason: str


@dataclass(frozen=True)
class RunUnknown:
    """``cont`` was sent and not answered: the copy counts as having run (rule R4)."""


@dataclass(frozen=True)
class MachineGone:
    """The machine's process has ended."""


@dataclass(frozen=True)
class LinkLost:
    """The connection between the two agents is gone."""


@dataclass(frozen=True)
class AbortAsked:
    reason: str


@dataclass(frozen=True)
class TimerFired:
    timer: Timer


Event = (
    Ordered
    | MachineReady
    | MachineFailed
    | Written
    | WriteFailed
    | StreamMoved
    | TargetLoaded
    | TargetAnswered
    | TargetFailed
    | GoArrived
    | SourceAborted
    | GuestRuns
    | RunRefused
    | RunUnknown
    | MachineGone
    | LinkLost
    | AbortAsked
    | TimerFired
)

# ------------------------------------------------------------------ actions


@dataclass(frozen=True)
class WriteRecord:
    record: Record


@dataclass(frozen=True)
class MakeMachine:
    """Target: blocked ports, then a machine that waits for the stream."""


@dataclass(frozen=True)
class StartStream:
    """Source: begin pre-copy."""


@dataclass(frozen=True)
class ContinueStream:
    """Source: leave pre-switchover."""


@dataclass(frozen=True)
class CancelStream:
    """Source: out-of-band yank, then cancel; ``StreamMoved`` says what came of it."""


@dataclass(frozen=True)
class SendLoaded:
    """Target -> source."""


@dataclass(frozen=True)
class SendGo:
    """Source -> target."""


@dataclass(frozen=True)
class SendAborted:
    """Source -> target: withdraw."""


@dataclass(frozen=True)
class SendFailed:
    """Target -> source, before the commit."""

    reason: str


@dataclass(frozen=True)
class SendAnswer:
    """Target -> source."""

    word: Word


@dataclass(frozen=True)
class OpenPorts:
    pass


@dataclass(frozen=True)
class BlockPorts:
    pass


@dataclass(frozen=True)
class Run:
    """``cont``; only where the last record allows it (rule R1)."""


@dataclass(frozen=True)
class AwaitGuest:
    """Source, after a broken stream: the hypervisor resumes the guest itself; see that it does."""


@dataclass(frozen=True)
class Announce:
    """Tell the network that every address of the EVM and its pods is here."""


@dataclass(frozen=True)
class KillMachine:
    """Kill this migration's machine, wait for its exit, remove its ports; ``MachineGone`` follows."""


@dataclass(frozen=True)
class SetTimer:
    timer: Timer


Action = (
    WriteRecord
    | MakeMachine
    | StartStream
    | ContinueStream
    | CancelStream
    | SendLoaded
    | SendGo
    | SendAborted
    | SendFailed
    | SendAnswer
    | OpenPorts
    | BlockPorts
    | Run
    | AwaitGuest
    | Announce
    | KillMachine
    | SetTimer
)
