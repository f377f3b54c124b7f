"""What the pool of the tests of client and command line holds: one of everything, and a migration stage by stage."""

from __future__ import annotations

from uuid import UUID

from emp.model.clock import GuestClock
from emp.model.evm import Evm, EvmSpec, EvmState, Nic, Pod
from emp.model.migration import (
    Check,
    Migration,
    MoveStep,
    Outcome,
    Progress,
    Report,
    Stage,
    StageTimes,
    VolumeMove,
    VolumeStep,
)
from emp.model.network import EvmNetwork, LearntAddress, Traffic
from emp.model.node import EvmReport, Node, NodeReport, Versions
from emp.model.volume import Attachment, Handover, MoveOrder, NbdEndpoint, Volume, VolumeState, VolumeType

ID = "m-0123456789"
VERSIONS = Versions(
    emp="0.1.0", protocol=1, qemu="10.0.2", machines=("pc-q35-10.0",), cpu_models=("qemu64",), accelerator="tcg",
    images={"micro": "sha256:abcdef0123456789"},
)  # fmt: skip
N1 = Node(
    report=NodeReport(
        name="n1", address="10.77.0.11", port=7702, link_port=7703, memory_bytes=4 << 30, memory_used_bytes=512 << 20,
        vcpus=8, versions=VERSIONS, boot_id="b1", evms=(EvmReport(name="web", state=EvmState.RUNNING, epoch=7),),
    ),
    last_seen_at=1_700_000_000.0,
)  # fmt: skip
WEB = Evm(
    spec=EvmSpec(
        name="web", uuid=UUID(int=7), memory_bytes=512 << 20, vcpus=2, image="micro", image_digest="sha256:abcdef",
        machine="pc-q35-10.0", cpu_model="qemu64", volumes=("vol-1",),
        nics=(Nic(mac="52:54:00:00:00:01", address="10.77.1.1", prefix_length=16),),
        pods=(Pod(name="shop", mac="52:54:00:00:00:02", address="10.77.1.2", prefix_length=16),),
    ),
    state=EvmState.RUNNING, owner="n1", epoch=7, created_at=1_700_000_000.0,
)  # fmt: skip
ON_THE_WIRE = EvmNetwork(
    learnt=(LearntAddress(mac="52:54:00:00:00:02", address="10.77.9.9"),),
    refused=(LearntAddress(mac="52:54:00:00:00:01", address="10.77.0.2"),),
    traffic=Traffic(received_frames=7, received_bytes=2048, sent_frames=5, dropped_frames=3, spoofed_frames=2),
)
CLOCK = GuestClock(found_ms=-26.9, now_ms=0.4, error_ms=0.8, is_set=True, at_s=1_700_000_000.0)
VOL = Volume(
    id="vol-1", type=VolumeType.IO2, size_bytes=1 << 30, serial="s1", evm="web",
    attachments=(
        Attachment(
            volume="vol-1", node="n1", epoch=7,
            endpoint=NbdEndpoint(host="10.77.0.2", port=10809, export="vol-1", tls_hostname="volumes-main"),
        ),
    ),
    state=VolumeState.IN_USE, driver="nbd",
)  # fmt: skip
SHARED = Volume(
    id="shared-0123456789ab", type=VolumeType.SHARED, size_bytes=1 << 30, serial="shared0123456789ab",
    url="rbd:vms/web", state=VolumeState.AVAILABLE, driver="shared",
)  # fmt: skip
RELAYED = VOL.model_copy(
    update={
        "id": "vol-2", "type": VolumeType.GP3, "state": VolumeState.RELAYED, "driver": "ebs",
        "attachments": (Attachment(volume="vol-2", node="n2", epoch=7, claimed=9),),
        "handover": Handover(
            migration=ID, order=MoveOrder.RELAY, source="n2", target="n1", began_at=1_700_000_004.0,
            relayed_bytes=12 << 20, relayed_s=41.5, tries=3, alarm="vol-2 is still detaching at n2",
        ),
    }
)  # fmt: skip
MOVED = RELAYED.model_copy(
    update={
        "id": "vol-3", "state": VolumeState.ERROR, "fault": "EC2 says that its hardware has failed: error",
        "handover": Handover(
            migration=ID, order=MoveOrder.RELAY, source="n2", target="n1", began_at=1_700_000_004.0,
            ended_at=1_700_000_012.0, io_stall_ms=7123.4, detach_ms=4600.0, attach_ms=2400.0, relayed_bytes=3 << 20,
            relayed_s=0.9,
        ),
    }
)  # fmt: skip
PLAN = Migration(
    id=ID, evm="web", source="n1", target="n2", epoch_target=8, epoch_source=9,
    placement="the only node that fits (3.5 GiB free)", created_at=1_700_000_000.0,
    checks=(Check(name="memory", ok=True, message="3.5 GiB free on n2, 512 MiB needed"),),
)  # fmt: skip
COPYING = PLAN.model_copy(
    update={
        "stage": Stage.SOURCE_BROWNOUT,
        "progress": Progress(
            memory_bytes=512 << 20, remaining_bytes=128 << 20, sent_bytes=400 << 20, passes=2, eta_s=1.5,
            dirty_bytes_per_s=12 << 20, bandwidth_bytes_per_s=310 << 20,
        ),
    }
)  # fmt: skip
BLACKOUT = COPYING.model_copy(update={"stage": Stage.BLACKOUT})
RUNS_THERE = BLACKOUT.model_copy(update={"stage": Stage.TARGET_BROWNOUT, "committed": True})
STUCK = RUNS_THERE.model_copy(
    update={
        "hint": "vol-3 it stays relayed by n1, which has to stay up: no permission; tried again in 1 s",
        "moving": (VolumeStep(volume="vol-3", type=VolumeType.GP3, step=MoveStep.RELAYED, expected_ms=7000.0),),
    }
)
MOVES = (
    VolumeMove(
        volume="vol-0123456789abcdef0", held_ms=7123.4, hold_s=0.0124, detach_s=4.6, attach_s=2.4, land_s=0.111,
        tries=3, read_bytes=12 << 20, written_bytes=1 << 19, mean_ms=1.2, max_ms=40.5,
    ),
    VolumeMove(volume="vol-4", held_ms=2500.0, attach_s=2.4, land_s=0.1),
)  # fmt: skip
COMPLETED = RUNS_THERE.model_copy(
    update={
        "stage": Stage.CLOSED,
        "outcome": Outcome.COMPLETED,
        "ended_at": 1_700_000_004.2,
        "report": Report(
            stages=StageTimes(source_brownout_s=3.1, blackout_ms=18.2, target_brownout_s=0.25),
            vcpu_pause_ms=14.1, clock_error_ms=0.2, qemu_downtime_ms=12.0, memory_bytes=512 << 20,
            sent_bytes=540 << 20, passes=3, dirty_bytes_per_s=12 << 20, bandwidth_bytes_per_s=310 << 20,
        ),
    }
)  # fmt: skip
ABORTED = BLACKOUT.model_copy(
    update={
        "stage": Stage.CLOSED,
        "outcome": Outcome.ABORTED,
        "cause": "the link to n2 broke",
        "ended_at": 1_700_000_004.2,
        "report": Report(abort_pause_ms=8.0, sent_bytes=540 << 20, memory_bytes=512 << 20),
    }
)
WHOLE_WAY = (COPYING, BLACKOUT, RUNS_THERE, COMPLETED)
