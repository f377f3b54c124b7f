"""The argv of a machine: the whole of it once, and what must hold for any."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emp.hypervisor.base import BlockDevice, LaunchPlan, RelaySocket
from emp.hypervisor.qemu.command_line import Descriptors, command_line
from emp.hypervisor.qemu.guest_config import guest_config
from emp.model.errors import BadInput
from emp.model.evm import EvmSpec, Nic, Pod
from emp.model.volume import HostDevice, NbdEndpoint, RbdImage

SPEC = EvmSpec(
    name="web",
    uuid=UUID("3b774fe0-3b96-4ff3-8000-000000000001"),
    memory_bytes=512 << 20,
    vcpus=2,
    image="micro",
    image_digest="0123",
    machine="pc-i440fx-10.0",
    cpu_model="Westmere-v1",
    nics=(
        Nic(mac="52:54:00:00:00:01", address="10.77.1.5", prefix_length=16),
        Nic(mac="52:54:00:00:00:02", address="fd00::5", prefix_length=64),
    ),
    pods=(Pod(name="db", nic=1, mac="52:54:00:00:00:03", address="10.77.2.5", prefix_length=16),),
    volumes=("vol-a", "vol-b"),
)


def device(name: str, host: str) -> BlockDevice:
    endpoint = NbdEndpoint(host=host, port=10809, export=f"{name}@7", tls_hostname="volumes")
    return BlockDevice(volume=name, serial=f"{name}-serial", size_bytes=1 << 30, source=endpoint)


PLAN = LaunchPlan(
    spec=SPEC,
    kernel=Path("/images/kernel"),
    initrd=Path("/images/initrd"),
    kernel_command_line="console=ttyS0 quiet",
    tap_fds=(20, 21),
    volumes=(device("vol-a", "10.0.0.9"), device("vol-b", "10.0.0.9")),
    incoming=False,
    mtus_bytes=(1500, 9001),
)
FDS = Descriptors(
    directory=10,
    kernel=11,
    initrd=12,
    sockets={"control": 13, "cancel": 14, "guard": 15, "console": 16, "qga": 17},
    taps=(20, 21),
)

GOLDEN = """\
/usr/bin/qemu-system-x86_64
-name guest=web,debug-threads=on
-uuid 3b774fe0-3b96-4ff3-8000-000000000001
-nodefaults
-no-user-config
-display none
-msg timestamp=on
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-no-shutdown
-action reboot=reset,shutdown=pause,panic=pause,watchdog=reset
-machine pc-i440fx-10.0,usb=off,vmport=off,dump-guest-core=off,memory-backend=memory
-accel tcg
-cpu Westmere-v1,enforce=on
-smp cpus=2,sockets=1,cores=2
-m 512M
-object {"qom-type":"memory-backend-ram","id":"memory","size":536870912,"share":false,"prealloc":false,"merge":false,"dump":false}
-kernel /proc/self/fd/11
-initrd /proc/self/fd/12
-append console=ttyS0 quiet
-fw_cfg name=opt/emp/config,file=/proc/self/fd/10/config
-chardev socket,id=control,fd=13,server=on,wait=off
-mon chardev=control,mode=control
-chardev socket,id=cancel,fd=14,server=on,wait=off
-mon chardev=cancel,mode=control
-chardev socket,id=guard,fd=15,server=on,wait=off
-mon chardev=guard,mode=control
-chardev socket,id=console,fd=16,server=on,wait=off
-chardev socket,id=qga,fd=17,server=on,wait=off
-device {"driver":"isa-serial","id":"serial0","chardev":"console"}
-device {"driver":"isa-serial","id":"serial1","chardev":"qga","index":1}
-device {"driver":"pvpanic","id":"panic0"}
-netdev {"type":"tap","id":"net0","fd":"20","vhost":false}
-device {"driver":"virtio-net-pci","id":"nic0","bus":"pci.0","addr":"0x4","disable-legacy":"on","netdev":"net0","mac":"52:54:00:00:00:01","romfile":"","rx_queue_size":1024,"host_mtu":1500,"guest_ufo":false,"host_ufo":false,"guest_uso4":false,"guest_uso6":false,"host_uso":false}
-netdev {"type":"tap","id":"net1","fd":"21","vhost":false}
-device {"driver":"virtio-net-pci","id":"nic1","bus":"pci.0","addr":"0x5","disable-legacy":"on","netdev":"net1","mac":"52:54:00:00:00:02","romfile":"","rx_queue_size":1024,"host_mtu":9001,"guest_ufo":false,"host_ufo":false,"guest_uso4":false,"guest_uso6":false,"host_uso":false}
-object {"qom-type":"tls-creds-x509","id":"volumes","endpoint":"client","dir":"/proc/self/fd/10/tls","verify-peer":true}
-device {"driver":"virtio-scsi-pci","id":"scsi0","bus":"pci.0","addr":"0x8","disable-legacy":"on","num_queues":2}
-blockdev {"node-name":"source0-0cb5eb134bb9","cache":{"direct":true,"no-flush":false},"driver":"nbd","server":{"type":"inet","host":"10.0.0.9","port":"10809"},"export":"vol-a@7","tls-creds":"volumes","tls-hostname":"volumes","reconnect-delay":8}
-blockdev {"driver":"raw","node-name":"volume0","size":1073741824,"file":"source0-0cb5eb134bb9","cache":{"direct":true,"no-flush":false}}
-device {"driver":"scsi-hd","id":"disk0","bus":"scsi0.0","channel":0,"scsi-id":0,"lun":0,"drive":"volume0","serial":"vol-a-serial","device_id":"vol-a-serial","logical_block_size":512,"physical_block_size":512,"cyls":16383,"heads":255,"secs":63,"write-cache":"on","werror":"stop","rerror":"stop"}
-blockdev {"node-name":"source1-7c0111d7e157","cache":{"direct":true,"no-flush":false},"driver":"nbd","server":{"type":"inet","host":"10.0.0.9","port":"10809"},"export":"vol-b@7","tls-creds":"volumes","tls-hostname":"volumes","reconnect-delay":8}
-blockdev {"driver":"raw","node-name":"volume1","size":1073741824,"file":"source1-7c0111d7e157","cache":{"direct":true,"no-flush":false}}
-device {"driver":"scsi-hd","id":"disk1","bus":"scsi0.0","channel":0,"scsi-id":0,"lun":1,"drive":"volume1","serial":"vol-b-serial","device_id":"vol-b-serial","logical_block_size":512,"physical_block_size":512,"cyls":16383,"heads":255,"secs":63,"write-cache":"on","werror":"stop","rerror":"stop"}
"""  # noqa: E501 - one option a line


def argv(plan: LaunchPlan, *, accelerator: str = "tcg", fds: Descriptors = FDS) -> list[str]:
    return command_line(plan, binary=Path("/usr/bin/qemu-system-x86_64"), accelerator=accelerator, fds=fds)


def test_golden() -> None:
    expected = [word for line in GOLDEN.splitlines() for word in line.split(" ", 1)]
    assert argv(PLAN) == expected


def test_a_target_offers_the_same_machine_and_waits() -> None:
    assert argv(replace(PLAN, incoming=True)) == [*argv(PLAN), "-S", "-incoming", "defer"]


def test_what_the_guest_sees_does_not_depend_on_the_node() -> None:
    elsewhere = replace(
        PLAN,
        kernel=Path("/elsewhere/kernel"),
        tap_fds=(7, 8),
        volumes=(device("vol-a", "10.0.0.77"), device("vol-b", "10.0.0.77")),
    )
    other = Descriptors(
        directory=30,
        kernel=31,
        initrd=32,
        sockets={"control": 4, "cancel": 5, "guard": 6, "console": 9, "qga": 12},
        taps=(7, 8),
    )
    here, there = argv(PLAN), argv(elsewhere, fds=other, accelerator="kvm")
    for guest_facing in ("-device", "-machine", "-cpu", "-smp", "-m", "-uuid", "-append"):
        values = [[words[i + 1] for i, word in enumerate(words) if word == guest_facing] for words in (here, there)]
        assert values[0] == values[1], guest_facing


def test_no_two_devices_share_a_slot() -> None:
    full = replace(
        PLAN,
        spec=SPEC.model_copy(
            update={
                "nics": tuple(Nic(mac=f"52:54:00:00:00:0{n}", address="10.0.0.1", prefix_length=8) for n in range(4)),
                "volumes": tuple(f"v{n}" for n in range(24)),
            }
        ),
        tap_fds=(1, 2, 3, 4),
        mtus_bytes=(1500,) * 4,
        volumes=tuple(device(f"v{n}", "h") for n in range(24)),
    )
    words = argv(full, fds=replace(FDS, taps=(1, 2, 3, 4)))
    devices = [json.loads(words[i + 1]) for i, word in enumerate(words) if word == "-device"]
    slots = [int(one["addr"], 16) for one in devices if "addr" in one]
    assert len(slots) == len(set(slots)) == 5
    assert max(slots) <= 31
    assert [one["lun"] for one in devices if "lun" in one] == list(range(24))


def test_a_volume_is_at_the_address_that_the_record_says() -> None:
    apart = replace(PLAN, spec=SPEC.model_copy(update={"volume_slots": (7, 2)}))
    words = argv(apart)
    disks = [json.loads(words[i + 1]) for i, word in enumerate(words) if word == "-device" and '"lun"' in words[i + 1]]
    seen = [(one["lun"], one["serial"], one["drive"]) for one in disks]
    assert seen == [(7, "vol-a-serial", "volume7"), (2, "vol-b-serial", "volume2")]


def test_what_the_guest_sees_of_a_disk_does_not_depend_on_what_it_is_opened_from() -> None:
    plain = argv(PLAN)
    device, relay = HostDevice(path="/dev/nvme1n1", serial="x", size_bytes=1 << 30), RelaySocket(Path("/run/r/vol-b"))
    volumes = (replace(PLAN.volumes[0], source=device), replace(PLAN.volumes[1], source=relay))
    words = argv(replace(PLAN, volumes=volumes), fds=replace(FDS, devices={0: 40}, relays={1: 41}))
    for guest_facing in ("-device", "-machine"):
        values = [[each[i + 1] for i, word in enumerate(each) if word == guest_facing] for each in (plain, words)]
        assert values[0] == values[1]
    nodes = [json.loads(words[i + 1]) for i, word in enumerate(words) if word == "-blockdev"]
    assert [(node["driver"], node.get("filename")) for node in nodes[:2]] == [
        ("host_device", "/dev/fdset/0"),
        ("raw", None),
    ]
    assert words[words.index("-add-fd") + 1] == "fd=40,set=0"
    assert nodes[2]["server"] == {"type": "unix", "path": "/proc/self/fd/41/vol-b"}
    assert {node["node-name"] for node in nodes if node["driver"] == "raw"} == {"volume0", "volume1"}
    assert all(node["size"] == 1 << 30 for node in nodes if node["driver"] == "raw")
    assert not any("/run/r" in word or "/dev/nvme" in word for word in words)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_the_kernel_command_line_is_one_word_whatever_is_in_it(text: str) -> None:
    words = argv(replace(PLAN, kernel_command_line=text))
    plain = argv(PLAN)
    assert [word for word, other in zip(words, plain, strict=True) if word != other] in ([], [text])


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_what_a_volume_is_called_elsewhere_stays_inside_its_json(text: str) -> None:
    endpoint = PLAN.volumes[0].source
    assert isinstance(endpoint, NbdEndpoint)
    volume = replace(PLAN.volumes[0], source=endpoint.model_copy(update={"export": text}))
    words = argv(replace(PLAN, volumes=(volume, PLAN.volumes[1])))
    assert len(words) == len(argv(PLAN))
    nbd = next(json.loads(word) for word in words if '"driver":"nbd"' in word)
    assert nbd["export"] == text


def test_a_ceph_image_is_opened_by_the_clusters_own_names_and_keys() -> None:
    image = RbdImage(pool="vms", image="web", user="emp")
    words = argv(replace(PLAN, volumes=(replace(PLAN.volumes[0], source=image), PLAN.volumes[1])))
    node = json.loads(next(word for word in words if '"driver":"rbd"' in word))
    assert node.pop("node-name") in next(word for word in words if '"node-name":"volume0"' in word)
    assert node == {
        "driver": "rbd",
        "pool": "vms",
        "image": "web",
        "user": "emp",
        "cache": {"direct": True, "no-flush": False},
    }
    disks = [word for word in words if word.startswith('{"driver":"scsi-hd"')]
    assert disks and disks == [word for word in argv(PLAN) if word.startswith('{"driver":"scsi-hd"')]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("machine", {"machine": "pc-q35-10.0"}),
        ("machine", {"machine": "pc-i440fx-10.0,accel=kvm"}),
        ("machine", {"machine": "pc"}),
        ("cpu_model", {"cpu_model": "host"}),
        ("cpu_model", {"cpu_model": "Westmere-v1,+vmx"}),
        ("cpu_model", {"cpu_model": "-h"}),
        ("memory_bytes", {"memory_bytes": (512 << 20) + 4096}),
        ("memory_bytes", {"memory_bytes": 1 << 20}),
        ("name", {"name": "web,process=x"}),
        ("name", {"name": "../web"}),
        ("nics", {"nics": SPEC.nics * 3}),
        ("volumes", {"volumes": ("vol-b", "vol-a")}),
    ],
)
def test_bad_records_are_refused_by_field(field: str, change: dict[str, object]) -> None:
    spec = SPEC.model_copy(update=change)
    with pytest.raises(BadInput) as error:
        argv(replace(PLAN, spec=spec, tap_fds=tuple(range(20, 20 + len(spec.nics)))))
    assert error.value.field == field


def test_a_kernel_command_line_that_cannot_be_passed_is_refused() -> None:
    with pytest.raises(BadInput) as error:
        argv(replace(PLAN, kernel_command_line="quiet\0single"))
    assert error.value.field == "kernel_command_line"


@pytest.mark.parametrize("serial", ["", "a" * 21, "a,b", "a b", "é"])
def test_a_serial_that_the_guest_would_not_see_whole_is_refused(serial: str) -> None:
    with pytest.raises(BadInput) as error:
        argv(replace(PLAN, volumes=(replace(PLAN.volumes[0], serial=serial), PLAN.volumes[1])))
    assert error.value.field == "serial"


def test_guest_config_names_what_the_evm_is() -> None:
    assert guest_config(SPEC) == (
        "hostname web\n"
        "nic 0 mac 52:54:00:00:00:01 addr 10.77.1.5/16\n"
        "nic 1 mac 52:54:00:00:00:02 addr fd00::5/64\n"
        "pod db nic 1 mac 52:54:00:00:00:03 addr 10.77.2.5/16\n"
    )


def test_no_path_of_the_node_is_given_to_qemu() -> None:
    paths = [path for word in argv(PLAN)[1:] for path in re.findall(r"(?<![\w/])/[\w/]+", word)]
    assert paths
    assert all(path.startswith("/proc/self/fd/") for path in paths)
