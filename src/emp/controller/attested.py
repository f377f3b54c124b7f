"""What the controller may believe of an EVM from what agents say. Pure.

The controller's ``{owner, epoch}`` is a copy. The owner's agent attests it with every heartbeat; another node's word
counts only where its epoch is newer (the controller had missed a hand-over). Where the owner is silent, the EVM's state
is unknown: silence says nothing about the guest.
"""

from __future__ import annotations

from emp.model.evm import Evm, EvmState
from emp.model.node import EvmReport

ENDED = (EvmState.STOPPED, EvmState.PANICKED, EvmState.CRASHED)
"""states from which a cold start may follow: the owner has attested that the guest has ended"""


def from_owner(evm: Evm, report: EvmReport) -> Evm:
    """Fold in the owner's word. While a migration is open its end decides, and ``migrating`` is what people see."""
    state, reason = report.state, report.reason
    if evm.migration is not None and state in (EvmState.RUNNING, EvmState.PAUSED):
        state, reason = EvmState.MIGRATING, None
    elif evm.migration is None and state is EvmState.MIGRATING:
        state = EvmState.RUNNING
    if state is evm.state and state in ENDED and evm.reason and evm.reason.startswith(reason or ""):
        reason = evm.reason  # says more than the owner does
    return evm.model_copy(update={"state": state, "reason": reason})


def from_elsewhere(evm: Evm, node: str, report: EvmReport) -> Evm:
    """Fold in the word of a node that is not the owner on record: a newer epoch makes it the owner."""
    if report.epoch <= evm.epoch or report.state is EvmState.UNKNOWN:
        return evm
    return from_owner(evm.model_copy(update={"owner": node, "epoch": report.epoch}), report)


def owner_is_silent(evm: Evm, reason: str) -> Evm:
    if evm.state is EvmState.STOPPED and not evm.want_running:
        return evm  # stopped by request, as its owner attested: nothing there could start it again
    return evm.model_copy(update={"state": EvmState.UNKNOWN, "reason": reason})


def owner_forgot(evm: Evm) -> Evm:
    """The owner's agent reports, and does not know the EVM: its journal was lost, or this copy is wrong."""
    reason = f"{evm.owner} does not know this EVM"
    return evm.model_copy(update={"state": EvmState.UNKNOWN, "reason": reason})
