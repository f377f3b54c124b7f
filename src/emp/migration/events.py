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
    """What the target answers. The first two come from its journal and decide; the others only tell where it stands."""

    ACTIVATED = "activated"
    """it runs, or has run: the source's copy is stale for ever"""
    WITHDRAWN = "withdrawn"
    """it never ran and never will: the source may go back"""
    WAITING = "waiting"
    """it has not run, and no GO has come"""
    GOING = "going"
    """GO has come; whether the guest runs is being decided"""


class Timer(StrEnum):
    DEADLINE = "deadline"
    """of the source brownout"""
    BLACKOUT = "blackout"
    """of the blackout before the commit"""
    REPEAT = "repeat"
    """GO, a question or a write of the journal is tried again"""
    ANSWER = "answer"
    """a restarted source has asked its target, and waits so long for the answer"""
    RETRY = "retry"
    """``cont`` was refused and is tried again, ever less often"""


# ------------------------------------------------------------------ events


@dataclass(frozen=True)
class Ordered:
    """The controller's order has arrived: prepare (target) or hand over (source)."""


@dataclass(frozen=True)
class Resumed:
    """Source: its agent was restarted where only the target can know more."""


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
    """Source: the target's word, over the link or by the controller as courier."""

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
class PeerAsks:
    """The other end asks where this one stands."""

    nonce: str


@dataclass(frozen=True)
class GuestRuns:
    """The guest runs here (QEMU's word)."""


@dataclass(frozen=True)
class GuestEnded:
    """The guest has shut down or panicked: there is nothing left to run."""

    reason: str


@dataclass(frozen=True)
class RunRefused:
    """``cont`` was refused with an error: the guest did not run. A target sends it only once."""

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
class Retired:
    """RETIRE(k) has come: what is here of the EVM dies, whatever the migration was about to do (rule R8)."""


@dataclass(frozen=True)
class TimerFired:
    timer: Timer


Event = (
    Ordered
    | Resumed
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
    | PeerAsks
    | GuestRuns
    | GuestEnded
    | RunRefused
    | RunUnknown
    | MachineGone
    | LinkLost
    | AbortAsked
    | Retired
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
class Ask:
    """Ask the other end where it stands; dial it where there is no link."""


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
class ClaimVolumes:
    """Tell the volume service, until it has heard, that this node owns the EVM: older epochs are shut out there."""


@dataclass(frozen=True)
class OpenRelays:
    """Source, GIVEN on disk: let the target's writes through to the volumes that are still attached here."""


@dataclass(frozen=True)
class CloseRelays:
    """Source, on its way back: end them, so that nobody but the guest here reaches its volumes."""


@dataclass(frozen=True)
class Forward:
    """Source, GIVEN on disk: frames for the EVM go to the target."""


@dataclass(frozen=True)
class TakeBackFrames:
    """Source, on its way back: what was held goes to the guest here."""


@dataclass(frozen=True)
class Quarantine:
    """The journal of this node is proven to have lost a record: nothing is answered from it any more."""

    reason: str


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
    | Ask
    | OpenPorts
    | BlockPorts
    | Run
    | AwaitGuest
    | Announce
    | ClaimVolumes
    | OpenRelays
    | CloseRelays
    | Forward
    | TakeBackFrames
    | Quarantine
    | KillMachine
    | SetTimer
)
