"""Who may write to a volume: one epoch at a time, by the volume server's own log, over migrations and ways back."""

from __future__ import annotations

import json
from typing import Any

from emp.lab.topology import VOL
from emp.model.migration import Outcome
from tests.lab.conftest import Pool
from tests.lab.pool import Subject, subject, until


def log_of(evm: Subject) -> list[dict[str, Any]]:
    """Return what the volume server has noted of the EVM's volume."""
    text = (evm.pool.files.data(VOL.name) / "epochs.log").read_text()
    (volume,) = evm.record.spec.volumes
    return [line for line in map(json.loads, text.splitlines()) if line["volume"] == volume]


def claims(evm: Subject) -> list[tuple[str, int]]:
    return [(line["node"], line["tag"]) for line in log_of(evm) if line["event"] == "claim"]


def epochs(evm: Subject) -> list[int]:
    """Return what has shut older epochs out, in turn: the new owner's claim, or the controller's fence."""
    return [line.get("tag", line["epoch"]) for line in log_of(evm) if line["event"] in ("claim", "fence")]


def test_the_volume_is_held_under_one_epoch_at_a_time(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["io2:16MiB"]) as evm:
        booted, there = evm.record.epoch, evm.migrate("n2")
        until(lambda: there.epoch_target in epochs(evm), "the source is shut out")

        aborted = evm.begin_slow("n1")
        assert evm.client.migrations.abort(aborted.id).outcome is Outcome.ABORTED
        evm.end_of(aborted)
        until(lambda: ("n2", aborted.epoch_source) in claims(evm), "the source that went back claims it anew")
        evm.check_only_on("n2")
        (attachment,) = evm.volumes[0].attachments
        assert attachment.epoch == there.epoch_target, "the session of the running guest is the one that it was"

        back = evm.migrate("n1")
        until(lambda: back.epoch_target in epochs(evm), "the source is shut out")
        evm.check_only_on("n1")
        assert epochs(evm) == [booted, there.epoch_target, aborted.epoch_source, back.epoch_target]
        lines = log_of(evm)
        opened = {(line["node"], line["epoch"]) for line in lines if line["event"] == "attach"}
        closed = {(line["node"], line["epoch"]) for line in lines if line["event"] == "close"}
        assert opened - closed == {("n1", back.epoch_target)}, "what is left open is what the guest uses"
