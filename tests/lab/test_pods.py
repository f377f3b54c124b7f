"""Kubernetes pods in an EVM go with it to another node: same addresses, processes and connections, no failed probe.

The pods are podman's, played from a Kubernetes YAML file by the systemd of a Debian that boots from an io2 volume.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from emp.lab import debian
from emp.lab.down import down
from emp.lab.kubelet_prober import KubeletProber
from emp.lab.places import NAMESPACES
from emp.lab.pods import Container, containers
from emp.lab.probing import Probing
from emp.lab.topology import CLIENT
from emp.lab.up import Options, up
from emp.model.errors import Refused, Unreachable
from emp.model.evm import EvmState
from tests.lab.conftest import Pool
from tests.lab.pool import Subject, subject, until
from tests.leaks import outliving

LAB = "the lab pods"
PODS = ("web-0", "web-1")
MEMORY_BYTES = 512 << 20
BOOT_S = 300.0
"""until the pods answer; a busy machine without virtualisation needs many times what an idle one does"""
RESTART_S = 120.0
PROBE_HZ = 20
"""low: a target that has yet to translate the guest's code (TCG) has the web server's fork to do within a second"""
AROUND = 3
"""probes of each pod before and after the migration"""

pytestmark = pytest.mark.timeout(BOOT_S + 300)  # with more than all waits of the longest test, so that they tell


@pytest.fixture(scope="module")
def pool(lab_home: Path) -> Iterator[Pool]:
    """Two nodes, with the image `debian` beside `micro`. It is not built here: tests are cut off from every network."""
    if not debian.is_built():
        pytest.skip("the guest image debian is not built: `scripts/setup --dev --test` does, as `make test` before it")
    with outliving(LAB):
        made = Pool(up(Options("pods", 2, images=("debian",))))
    yield made
    down(made.files)


@pytest.fixture(scope="module")
def worker(pool: Pool) -> Iterator[Subject]:
    """An EVM on n1 whose root disk is an io2 volume, and whose pods answer."""
    asked: dict[str, Any] = {"image": "debian", "root": "io2:1GiB", "pods": list(PODS), "memory_bytes": MEMORY_BYTES}
    with ExitStack() as made:
        with outliving(LAB):
            evm = made.enter_context(subject(pool, node="n1", boots=False, **asked))
        with kubelet_of(evm) as kubelet:
            until(
                lambda: {each.pod for each in kubelet.probes if not each.problem} == set(PODS),
                "the pods answer",
                timeout_s=BOOT_S,
            )
        for guest in (evm.guest(), *map(evm.pod, range(len(PODS)))):
            guest.wait_first_packet()
        yield evm


def kubelet_of(evm: Subject) -> KubeletProber:
    namespace = NAMESPACES / evm.pool.topology.namespace(CLIENT.name)
    return KubeletProber({pod.name: pod.address for pod in evm.spec.pods}, namespace=str(namespace))


def look(evm: Subject) -> dict[str, Container]:
    return containers(evm.pool.topology, evm.guest().address)


def macs_on_the_wire(evm: Subject) -> dict[str, str]:
    """Return address -> MAC as the client has learnt them anew, for the EVM and its pods."""
    evm.pool.run_in(CLIENT.name, "ip", "neigh", "flush", "all")
    for guest in (evm.guest(), *map(evm.pod, range(len(PODS)))):
        guest.wait_first_packet()
    told = json.loads(evm.pool.run_in(CLIENT.name, "ip", "-json", "neigh", "show").stdout)
    known = {each["dst"]: each.get("lladdr") for each in told}
    return {address: known[address] for _, address in evm.spec.addresses}


def wait_probes(kubelet: KubeletProber, count: int) -> None:
    """Return once each pod has been probed so often from now on."""
    now_s = time.monotonic()

    def enough() -> bool:
        asked = [each.pod for each in kubelet.probes if each.began_s >= now_s]
        return all(asked.count(pod) >= count for pod in PODS)

    until(enough, f"{count} probes of each pod")


def test_the_root_disk_is_a_volume_made_from_the_image(worker: Subject) -> None:
    (root,) = worker.volumes
    assert (root.type.value, root.image, root.size_bytes) == ("io2", "debian", 1 << 30)
    (disk,) = worker.guest().ask("disks")
    assert (disk["serial"], disk["bytes"]) == (root.serial, 1 << 30)


def test_a_pod_of_it_is_given_no_ipv6_address_that_nothing_would_answer_on(worker: Subject) -> None:
    asked = {"name": "six", "image": "debian", "root": "io2:1GiB", "memory_bytes": MEMORY_BYTES}
    with pytest.raises(Refused, match="pods of the image debian have IPv4 addresses alone") as caught:
        worker.client.evms.create({**asked, "pods": ["a", "b=auto"]})
    assert caught.value.field == "pods[1]"
    assert [evm.spec.name for evm in worker.client.evms.list().items] == [worker.name]


def test_two_pods_of_a_kubernetes_file_do_not_notice_a_migration(
    worker: Subject, capsys: pytest.CaptureFixture[str]
) -> None:
    before, macs, boot_id = look(worker), macs_on_the_wire(worker), worker.boot_id
    assert {f"{pod}-{part}" for pod in PODS for part in ("echo", "http")} < set(before)
    assert sorted(Counter(each.pod for each in before.values()).values()) == [3, 3]  # with what holds the namespaces
    assert all(each.pid and each.restarts == 0 for each in before.values())
    assert macs == {address: mac for mac, address in worker.spec.addresses}

    addresses = {"evm": worker.guest().address} | {pod.name: pod.address for pod in worker.spec.pods}
    with Probing(worker.pool.files, addresses, rate_hz=PROBE_HZ) as probing, kubelet_of(worker) as kubelet:
        wait_probes(kubelet, AROUND)
        with outliving(LAB):
            moved = worker.migrate("n2")
        wait_probes(kubelet, AROUND)
        seen = probing.stop()
    worker.check_only_on("n2")

    assert kubelet.failures() == []
    for target in addresses:
        tcp = seen["targets"][target]["tcp"]
        assert (tcp["connected"], tcp["resets"], tcp["reconnects"], tcp["total"]["lost"]) == (True, 0, 0, 0), target
        for total in (tcp["total"], seen["targets"][target]["udp"]["total"]):
            assert (total["boot_ids"].keys(), total["counters_monotone"]) == ({boot_id}, True), target
    assert look(worker) == before
    assert macs_on_the_wire(worker) == macs
    slowest_ms = max(each.took_s for each in kubelet.probes) * 1000
    with capsys.disabled():
        print(
            f"\n  {len(kubelet.probes)} probes, slowest {slowest_ms:.0f} ms;"
            f" vCPU pause {moved.report.vcpu_pause_ms:.0f} ms",
            end="",
        )


def test_the_checks_see_a_pod_that_stands_still_and_one_that_was_restarted(worker: Subject) -> None:
    """The planted faults: a guest frozen for longer than a probe may take, and a container killed from inside."""
    before = look(worker)
    node = worker.record.owner or ""
    with kubelet_of(worker) as kubelet:
        wait_probes(kubelet, 1)
        worker.pool.stop(node, f"qemu:{worker.name}")
        try:
            until(lambda: all(kubelet.failures(pod) for pod in PODS), "a probe of each pod fails")
        finally:
            worker.pool.cont(node, f"qemu:{worker.name}")
    assert all("timed out" in (each.problem or "") for each in kubelet.failures())

    victim = before["web-0-http"]
    worker.shell()
    worker.type(f"kill -9 {victim.pid}")

    def restarted() -> Container | None:
        with contextlib.suppress(Unreachable):  # podman does not say all while it restarts one
            found = look(worker)["web-0-http"]
            return found if found.restarts and found.pid else None
        return None

    after = until(restarted, "podman restarts it", timeout_s=RESTART_S)
    assert (after.restarts, after.id) == (1, victim.id)
    assert after != victim
    assert after.pid != victim.pid


def test_the_power_button_shuts_it_down(worker: Subject) -> None:
    stopped = worker.client.evms.stop(worker.name, grace_s=60.0)
    assert (stopped.state, stopped.reason) == (EvmState.STOPPED, "shut down on request")
