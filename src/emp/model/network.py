"""What an EVM does on the wire: the addresses that its taps show, and how much it sends and receives."""

from __future__ import annotations

from emp.model.base import Model
from emp.model.names import Ip, Mac


class LearntAddress(Model):
    """An address that nobody declared, and that the guest uses."""

    mac: Mac
    address: Ip
    nic: int = 0


class Traffic(Model):
    """Counted at the EVM's taps since it was started, over its migrations. Received and sent are the guest's view."""

    received_frames: int = 0
    received_bytes: int = 0
    sent_frames: int = 0
    sent_bytes: int = 0
    dropped_frames: int = 0
    """for the guest, which did not take them in time"""
    spoofed_frames: int = 0
    """from the guest, in the name of an address or a MAC that is not the EVM's"""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(**{name: getattr(self, name) + getattr(other, name) for name in Traffic.model_fields})


NO_TRAFFIC = Traffic()


class EvmNetwork(Model):
    """An EVM on the wire, as its node last reported."""

    learnt: tuple[LearntAddress, ...] = ()
    """addresses that its guest took by itself, with leave"""
    refused: tuple[LearntAddress, ...] = ()
    """those that it was heard to use and may not: what it sends from them is dropped"""
    traffic: Traffic | None = None
    """None: its node has not told"""
