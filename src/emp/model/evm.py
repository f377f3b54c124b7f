"""An EVM (elastic VM): what it is made of, where it runs, and how it is."""

from __future__ import annotations

from enum import StrEnum
from typing import Self
from uuid import UUID

from pydantic import Field, model_validator

from emp.model.base import Model
from emp.model.efs import EfsMount
from emp.model.names import Ip, Mac, Name, SizeBytes

MAX_VOLUMES = 24
"""of one EVM; each has a slot, 0 to 23"""


class RestartPolicy(StrEnum):
    """What the controller does when a guest ended by itself; an agent never boots a guest on its own."""

    NEVER = "never"
    ON_FAILURE = "on-failure"
    """after a guest panic or QEMU's death, not after a shutdown from inside"""
    ALWAYS = "always"


ROUTED_GATEWAY = "fe80::1"
"""of every EVM whose node routes IPv6 to it, on every node"""


class Ipv6(Model):
    """An IPv6 address of a card or a pod, beside its IPv4 address."""

    address: Ip
    prefix_length: int = Field(ge=0, le=128)
    """128: the guest has no neighbours, and sends everything by ``gateway``"""
    gateway: Ip | None = None
    """of the default route; None: the guest's own affair, by router advertisements say"""


class Nic(Model):
    """One network card of an EVM, with the primary address behind it."""

    mac: Mac
    address: Ip
    prefix_length: int = Field(ge=0, le=128)
    ipv6: Ipv6 | None = None


class Pod(Model):
    """A pod inside an EVM, on the wire with a MAC and address of its own."""

    name: Name
    nic: int = 0
    mac: Mac
    address: Ip
    prefix_length: int = Field(ge=0, le=128)
    ipv6: Ipv6 | None = None


class EvmSpec(Model):
    """Everything a node must know to build the EVM's QEMU; both ends of a migration build it from this record alone."""

    name: Name
    uuid: UUID
    memory_bytes: SizeBytes
    vcpus: int = Field(ge=1, le=255)
    image: Name
    image_digest: str
    machine: str
    """versioned machine type, such as ``pc-q35-10.0``: the same on every node that the EVM visits"""
    cpu_model: str
    nics: tuple[Nic, ...] = Field(min_length=1)
    pods: tuple[Pod, ...] = ()
    volumes: tuple[str, ...] = ()
    volume_slots: tuple[int, ...] = ()
    """where in the guest each of ``volumes`` is (a disk's LUN); empty: in their order, from 0"""
    efs: tuple[EfsMount, ...] = ()
    """file systems that the guest mounts by itself when it boots"""
    restart: RestartPolicy = RestartPolicy.ON_FAILURE

    @model_validator(mode="after")
    def _a_slot_each(self) -> Self:
        slots = self.volume_slots
        if slots and (len(slots) != len(self.volumes) or len(set(slots)) != len(slots)):
            raise ValueError("each volume has one slot, and no two have the same")
        if not all(0 <= slot < MAX_VOLUMES for slot in slots):
            raise ValueError(f"slots are 0 to {MAX_VOLUMES - 1}")
        return self

    @property
    def slots(self) -> tuple[int, ...]:
        """The slot of each of ``volumes``, in their order."""
        return self.volume_slots or tuple(range(len(self.volumes)))

    def with_volume(self, volume: str, slot: int) -> EvmSpec:
        """Return the record with one more volume."""
        return self.model_copy(update={"volumes": (*self.volumes, volume), "volume_slots": (*self.slots, slot)})

    def without_volume(self, volume: str) -> EvmSpec:
        """Return the record without it; the others stay where they are."""
        kept = [(each, slot) for each, slot in zip(self.volumes, self.slots, strict=True) if each != volume]
        return self.model_copy(
            update={"volumes": tuple(each for each, _ in kept), "volume_slots": tuple(slot for _, slot in kept)}
        )

    def free_slot(self) -> int | None:
        """Return the lowest slot that no volume has; None: all are taken."""
        return next((slot for slot in range(MAX_VOLUMES) if slot not in self.slots), None)

    @property
    def addresses(self) -> tuple[tuple[str, str], ...]:
        """Every (MAC, IP) that moves with the EVM: its own first, then its pods'."""
        there: tuple[Nic | Pod, ...] = (*self.nics, *self.pods)
        return tuple(pair for each in there for pair in _addresses_of(each))

    @property
    def has_ipv6(self) -> bool:
        """Whether a card or pod of it has an IPv6 address."""
        return any(":" in address for _, address in self.addresses)

    def behind(self, nic: int) -> tuple[tuple[str, str], ...]:
        """Those of ``addresses`` that are reached through a card: its own first, then its pods'."""
        there: tuple[Nic | Pod, ...] = (self.nics[nic], *(pod for pod in self.pods if pod.nic == nic))
        return tuple(pair for each in there for pair in _addresses_of(each))


def _addresses_of(each: Nic | Pod) -> list[tuple[str, str]]:
    six = [each.ipv6.address] if each.ipv6 is not None else []
    return [(each.mac, address) for address in (each.address, *six)]


class EvmState(StrEnum):
    """What an EVM is doing, as its owner node reports it."""

    CREATING = "creating"
    RUNNING = "running"
    MIGRATING = "migrating"
    PAUSED = "paused"
    """the guest stands still (a blackout, a storage error); the reason is beside it"""
    STOPPED = "stopped"
    """shut down from inside or by request"""
    PANICKED = "panicked"
    CRASHED = "crashed"
    """QEMU is gone without the guest having shut down"""
    UNKNOWN = "unknown"
    """the owner node does not answer, or its journal cannot be trusted"""


class Evm(Model):
    """The controller's record of an EVM. ``owner`` and ``epoch`` are a copy: the truth is the owner's own journal."""

    spec: EvmSpec
    state: EvmState = EvmState.CREATING
    reason: str | None = None
    want_running: bool = True
    owner: Name | None = None
    epoch: int = 0
    migration: str | None = None
    """id of the migration that is open, if one is"""
    created_at: float = 0.0
    """seconds since the Unix epoch, for people only: clocks decide nothing"""
