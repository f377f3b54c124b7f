"""Each verb, at a pool that answers: what is asked, what is printed, in words and as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emp.model.errors import Refused
from emp.model.migration import Check
from emp.model.volume import Volume
from tests.unit.test_cli_canned import (
    ABORTED,
    CLOCK,
    COMPLETED,
    ID,
    MOVED,
    N1,
    ON_THE_WIRE,
    PLAN,
    RELAYED,
    SHARED,
    STUCK,
    VOL,
    WEB,
)
from tests.unit.test_cli_pool import Controller, serving
from tests.unit.test_cli_run import POOL, Emp, in_process


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    with serving(tmp_path, monkeypatch) as pool:
        yield pool


@pytest.fixture
def emp(capsys: pytest.CaptureFixture[str]) -> Emp:
    return in_process(capsys)


BEHIND = "was 27 ms behind, set; now within 1.2 ms of its node's"
ON_WIRE = ["10.77.9.9", "10.77.0.2", "not this EVM's", "received 7 frames, 2 KiB", "3 frames", "2 frames"]
# (arguments, words of the text, what --json prints)
READ: dict[str, tuple[str, list[str], Any]] = {
    "node list": ("node list", ["n1", "ready", "10.77.0.11", "4 GiB", "512 MiB"], [N1]),
    "node show": ("node show n1", ["10.77.0.11:7702", "10.0.2 (tcg)", "web (running)"], N1),
    "evm list": ("evm list", ["web", "running", "n1", "10.77.1.1", "512 MiB"], [WEB]),
    "evm show": ("evm show web", ["10.77.1.2/16", "shop", "vol-1", "pc-q35-10.0", "epoch 7", *ON_WIRE, BEHIND], WEB),
    "evm start": ("evm start web --node n1", ["EVM web runs on n1"], WEB),
    "evm recover": ("evm recover web --node n1", ["EVM web runs on n1"], WEB),
    "evm stop": ("evm stop web --grace 0", ["EVM web is running"], WEB),
    "evm create": ("evm create web", ["EVM web runs on n1", "10.77.1.1", "10.77.1.2  shop"], WEB),
    "volume list": ("volume list", ["vol-1", "io2", "1 GiB", "in-use", "web", "n1"], [VOL]),
    "volume show": ("volume show vol-1", ["vol-1", "s1", "n1 (epoch 7)", "nbd", "in-use"], VOL),
    "volume create": ("volume create io2:1GiB", ["volume vol-1 is made: io2, 1 GiB"], VOL),
    "volume create shared": (
        "volume create shared --url rbd:vms/web --size 1GiB",
        ["volume shared-0123456789ab is known: shared, 1 GiB"],
        SHARED,
    ),
    "migration list": ("migration list", [ID, "n1 -> n2", "completed", "18.2 ms"], [COMPLETED]),
    "migration show": (f"migration show {ID}", ["completed", "14.1 ms", "540 MiB"], COMPLETED),
    "migration of an EVM": ("migration show web", [ID, "n1 -> n2"], COMPLETED),
}


@pytest.mark.parametrize("verb", READ)
def test_a_verb_prints_what_people_want_to_know(pool: Controller, emp: Emp, verb: str) -> None:
    arguments, words, _ = READ[verb]
    code, out, err = emp(f"--context {POOL} {arguments}")
    assert (code, err) == (0, "")
    assert [word for word in words if word not in out] == []
    assert max(map(len, out.splitlines())) <= 80
    assert "\033" not in out


@pytest.mark.parametrize("verb", READ)
def test_a_verb_prints_the_model_as_json(pool: Controller, emp: Emp, verb: str) -> None:
    arguments, _, model = READ[verb]
    code, out, err = emp(f"{arguments} --json")
    if isinstance(model, list):
        wanted = {"items": [each.model_dump(mode="json") for each in model], "revision": 41}
    else:
        wanted = model.model_dump(mode="json")
    if verb == "evm show":  # beside its record
        wanted |= {"network": ON_THE_WIRE.model_dump(mode="json"), "clock": CLOCK.model_dump(mode="json")}
    assert (code, json.loads(out), err) == (0, wanted, "")


@pytest.mark.parametrize(
    ("volume", "said"),
    [
        (
            RELAYED,
            [
                "state      relayed",
                "attached   n2 (epoch 7, claimed under 9)",
                f"n2 -> n1 by relay, under way since 2023-11-14 22:13 ({ID})",
                "relayed for 41.5 s, relayed 12 MiB",
                "ALARM after 3 tries: vol-2 is still detaching at n2",
            ],
        ),
        (
            MOVED,
            [
                "state      error: EC2 says that its hardware has failed: error",
                f"n2 -> n1 by relay, done 2023-11-14 22:13 ({ID})",
                "I/O stall 7.12 s, detach 4.6 s, attach 2.4 s, relayed for 0.9 s, relayed 3 MiB",
            ],
        ),
        (SHARED, ["type       shared", "url        rbd:vms/web", "state      available", "attached   to no node"]),
    ],
    ids=["relayed", "moved", "shared"],
)
def test_a_volume_is_shown_with_how_it_stands_and_came_there(
    pool: Controller, emp: Emp, monkeypatch: pytest.MonkeyPatch, volume: Volume, said: list[str]
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    pool.volumes = {volume.id: volume}
    code, out, _ = emp(f"volume show {volume.id}")
    assert (code, [line for line in said if line not in out]) == (0, [])
    assert ("last move" in out) is (volume.handover is not None)
    assert json.loads(emp(f"volume show {volume.id} --json")[1]) == volume.model_dump(mode="json")
    monkeypatch.undo()
    time.tzset()


def test_an_empty_pool_says_so(pool: Controller, emp: Emp) -> None:
    for held in (pool.nodes, pool.evms, pool.volumes, pool.migrations):
        held.clear()
    assert "emp evm create" in emp("evm list")[1]
    assert "No node" in emp("node list")[1]
    assert "no volume" in emp("volume list")[1]
    assert "no migration" in emp("migration list")[1]


def test_create_asks_for_what_was_said(pool: Controller, emp: Emp) -> None:
    emp(
        "evm create web --memory 2GiB --vcpus 2 --node n1 --pod shop --pod db=10.77.3.4 --nic auto --nic auto "
        "--volume io2:1GiB --volume vol-7 --efs fs-0123abcd:/data --restart always --cpu EPYC --image debian"
    )
    assert pool.told == [
        (
            "POST /v1/evms",
            {
                "name": "web", "memory_bytes": 2 << 30, "vcpus": 2, "node": "n1", "pods": ["shop", "db=10.77.3.4"],
                "nics": 3, "volumes": ["io2:1GiB", "vol-7"], "efs": ["fs-0123abcd:/data"], "restart": "always",
                "cpu_model": "EPYC", "image": "debian",
            },
        )
    ]  # fmt: skip


def test_a_nic_takes_no_address(pool: Controller, emp: Emp) -> None:
    code, _, err = emp("evm create web --nic 10.77.1.9")
    assert code == 2 and "field: nic" in err and pool.told == []


def test_grace_is_passed_on(pool: Controller, emp: Emp) -> None:
    emp("evm stop web --grace 1.5s")
    emp("evm delete web --grace 1min")
    assert pool.told[0] == ("POST /v1/evms/web/stop", {"grace_s": 1.5})
    assert ("grace", 60.0) in pool.told


@pytest.mark.parametrize("noun", ["evm", "volume"])
def test_delete_says_what_is_gone(pool: Controller, emp: Emp, noun: str) -> None:
    assert emp(f"{noun} delete vol-1")[1] == f"{'EVM' if noun == 'evm' else noun} vol-1 is deleted\n"
    assert json.loads(emp(f"{noun} delete vol-1 --json")[1]) == {"deleted": "vol-1"}


def test_cordon_and_uncordon(pool: Controller, emp: Emp) -> None:
    assert "takes no EVM" in emp("node cordon n1")[1]
    assert "cordoned" in emp("node list")[1]
    assert json.loads(emp("node uncordon n1 --json")[1])["cordoned"] is False


def test_a_fence_needs_a_confirmation_and_is_shown(pool: Controller, emp: Emp) -> None:
    code, out, err = emp("node fence n1")
    assert (code, out) == (2, "")
    assert "switches n1 off" in err and "do it: emp node fence n1 --confirm" in err
    code, out, err = emp("node fence n1 --confirm --reason burnt")
    assert (code, out, err) == (0, "node n1 is fenced; start its EVMs elsewhere: emp evm recover EVM\n", "")
    assert pool.told[-1] == ("POST /v1/nodes/n1/fence", {"confirm": True, "reason": "burnt"})
    assert "fenced" in emp("node list")[1]
    shown = emp("node show n1")[1]
    assert "burnt" in shown and "lifted once it is back and has given up: web" in shown
    assert json.loads(emp("node fence n1 --confirm --json")[1])["fence"]["retire"] == {"web": 8}


def test_a_quarantine_is_shown_until_a_person_readmits_the_node(pool: Controller, emp: Emp) -> None:
    pool.nodes["n1"] = N1.model_copy(update={"quarantine": "its journal is another one than it had"})
    assert "quarantined" in emp("node list")[1]
    assert "another one than it had" in emp("node show n1")[1]
    assert emp("node readmit n1")[0] == 2
    assert "is readmitted" in emp("node readmit n1 --confirm")[1]
    assert "quarantine" not in emp("node show n1")[1]


def test_a_node_that_is_down_says_since_when(pool: Controller, emp: Emp) -> None:
    pool.nodes["n1"] = N1.model_copy(update={"ready": False})
    assert "down since 2023-11-1" in emp("node list")[1]


def test_a_dry_run_prints_the_plan_and_every_check(pool: Controller, emp: Emp) -> None:
    code, out, _ = emp("migrate web --to n2 --dry-run --max-blackout 50 --deadline 2min --max-bandwidth 100MiB/s")
    assert code == 0
    for word in ("n2: the only node that fits", "ok", "3.5 GiB free on n2", "50 ms", "100 MiB/s", "nothing was done"):
        assert word in out
    asked = pool.told[0][1]
    assert asked["policy"] == {"max_blackout_ms": 50, "deadline_s": 120.0, "max_bandwidth_bytes_per_s": 100 << 20}
    assert (asked["target"], asked["dry_run"]) == ("n2", True)
    assert json.loads(emp("migrate web --dry-run --json")[1])["dry_run"] is True


def test_what_becomes_of_volumes_of_one_node_is_a_users_to_say(pool: Controller, emp: Emp) -> None:
    out = emp("migrate web --dry-run --classic --source-must-be-empty")[1]
    assert pool.told[0][1]["policy"] == {"volume_order": "classic", "source_must_be_empty": True}
    assert "gp2, gp3      classic; wait for the target if refused" in out
    assert "gp2, gp3      resume-first; stay with the source if refused" in emp("migrate web --dry-run")[1]


def test_a_migration_shows_where_its_volumes_are(pool: Controller, emp: Emp) -> None:
    pool.migrations[STUCK.id] = STUCK
    out = emp(f"migration show {STUCK.id}")[1]
    assert "volumes    vol-3 gp3: in use by way of n1" in out and "it stays relayed by n1" in out


def test_a_dry_run_shows_each_volume_below_the_other_checks(pool: Controller, emp: Emp) -> None:
    free = Check(name="volume vol-1", ok=True, message="io2, 1 GiB: attached to n2 before the pause")
    stuck = Check(name="volume shared-0123456789ab", ok=False, message="shared, 1 GiB: it is attached to n3 as well")
    pool.plan = PLAN.model_copy(update={"checks": (*PLAN.checks, free, stuck)})
    code, out, err = emp("migrate web --to n2 --dry-run")
    assert code == 5
    assert (
        "checks\n"
        "  ok  memory  3.5 GiB free on n2, 512 MiB needed\n"
        "volumes\n"
        "  ok  vol-1                io2, 1 GiB: attached to n2 before the pause\n"
        "  NO  shared-0123456789ab  shared, 1 GiB: it is attached to n3 as well\n"
    ) in out
    assert "volume shared-0123456789ab: shared, 1 GiB: it is attached to n3 as well" in err


def test_a_dry_run_that_would_be_refused_says_so(pool: Controller, emp: Emp) -> None:
    bad = Check(name="qemu", ok=False, message="9.2 on n2 is older")
    pool.plan = PLAN.model_copy(update={"checks": (*PLAN.checks, bad)})
    code, out, err = emp("migrate web --to n2 --dry-run")
    assert code == Refused.exit_code
    assert "NO  qemu" in out and "qemu: 9.2 on n2 is older" in err


def test_detach_prints_the_id_alone(pool: Controller, emp: Emp) -> None:
    code, out, err = emp(f"--context {POOL} migrate web --detach")
    assert (code, out) == (0, f"{ID}\n")
    assert "n1 -> n2" in err and f"emp --context {POOL} migration watch {ID}" in err
    assert json.loads(emp("migrate web --detach --json")[1])["id"] == ID


def test_show_tells_of_an_abort(pool: Controller, emp: Emp) -> None:
    pool.migrations[ID] = ABORTED
    out = emp(f"migration show {ID}")[1]
    assert "aborted" in out and "the link to n2 broke" in out and "stood still for 8 ms" in out


def test_a_migration_is_found_by_an_evm_whose_name_looks_like_an_id(pool: Controller, emp: Emp) -> None:
    name = "m-00000000ff"
    pool.evms[name] = WEB
    pool.migrations[ID] = COMPLETED.model_copy(update={"evm": name})
    assert json.loads(emp(f"migration show {name} --json")[1])["evm"] == name


def test_a_volume_is_attached_and_its_place_in_the_guest_said(pool: Controller, emp: Emp) -> None:
    assert emp("volume attach vol-2 web")[1] == "EVM web has volume vol-2, its disk 0:0:0:5\n"
    assert json.loads(emp("volume attach vol-2 web --json")[1])["spec"]["volumes"] == ["vol-1", "vol-2"]


def test_a_volume_in_use_is_detached_only_if_one_insists(pool: Controller, emp: Emp) -> None:
    code, _, err = emp("volume detach vol-1")
    assert (code, "using" in err) == (4, True)
    assert emp("volume detach vol-1 --in-use")[1] == "EVM web has volume vol-1 no longer\n"
    assert json.loads(emp("volume detach vol-1 --in-use --json")[1])["spec"]["name"] == "web"


def test_a_volume_of_nobody_cannot_be_detached(pool: Controller, emp: Emp) -> None:
    pool.volumes["vol-1"] = VOL.model_copy(update={"evm": None})
    code, _, err = emp("volume detach vol-1")
    assert (code, "no EVM" in err) == (4, True)


def test_a_volume_is_resized(pool: Controller, emp: Emp) -> None:
    assert emp("volume resize vol-1 2GiB")[1] == "volume vol-1 has 2 GiB\n"
    assert json.loads(emp("volume resize vol-1 2GiB --json")[1])["size_bytes"] == 2 << 30
    code, _, err = emp("volume resize vol-1 much")
    assert (code, "much" in err) == (2, True)
