"""How a volume stands, worked out of the records of it, of its EVM and of the EVM's migration. Pure; no guesses.

A state that is stored would have to be kept true by everybody who changes any of them.
"""

from __future__ import annotations

from emp.model.evm import Evm, EvmState
from emp.model.migration import Migration, Stage
from emp.model.volume import Volume, VolumeState

_RUNS = (EvmState.RUNNING, EvmState.MIGRATING, EvmState.PAUSED)


def state_of(volume: Volume, evm: Evm | None, migration: Migration | None, *, deleting: bool) -> VolumeState:
    """Return the state; ``evm`` is the one that has the volume, ``migration`` the EVM's that is open."""
    nodes = {attachment.node for attachment in volume.attachments}
    if deleting:
        return VolumeState.DELETING
    if volume.fault is not None:
        return VolumeState.ERROR
    if evm is not None and migration is not None and migration.stage is not Stage.CLOSED:
        is_over = evm.owner == migration.target  # before that it may be attached to the target alone: the classic order
        return VolumeState.RELAYED if is_over and _is_elsewhere(nodes, evm) else VolumeState.MOVING
    if evm is not None and evm.state in _RUNS and _is_elsewhere(nodes, evm):
        return VolumeState.RELAYED
    if nodes:
        return VolumeState.IN_USE
    return VolumeState.IDLE if volume.evm is not None else VolumeState.AVAILABLE


def _is_elsewhere(nodes: set[str], evm: Evm) -> bool:
    return bool(nodes) and evm.owner not in nodes
