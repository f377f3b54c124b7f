"""The daemons of a lab: their configuration and credentials, and starting, finding and signalling them.

They are the pool's own programs, started as on any machine (``python -m emp.agent --config FILE``). The one thing that
a lab adds: the controller's socket for people is opened in the machine's own network namespace and handed over, so that
``emp`` reaches it on 127.0.0.1 although the controller lives in a place. In a lab that keeps its daemons, each is the
child of a keeper, which starts it again when it ends.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from emp import faults
from emp.host.processes import Process
from emp.lab import keeper, region, scan
from emp.lab.images import KERNEL_COMMAND_LINE, Image
from emp.lab.nfs_program import NfsProgram
from emp.lab.places import NAMESPACES, enter_argv, init_of, source_directory
from emp.lab.state import LabFiles, LabState
from emp.lab.topology import (
    AGENT_PORT,
    BMC,
    BRIDGE,
    CONTROLLER_PORT,
    CTL,
    EVM_FIRST,
    EVM_LAST,
    EVMS_IPV6,
    FABRIC,
    LINK_PORT,
    NBD_PORTS,
    POWER_PORT,
    SUBNET,
    SUBNET_IPV6,
    UPLINK,
    VOL,
    VOLUMES_PORT,
    Network,
    Place,
    Role,
)
from emp.model.errors import BadInput, Conflict, NotFound
from emp.wire.pki import CertificateAuthority
from emp.wire.pki import Role as Identity
from emp.wire.secret import Secret
from emp.wire.sockets import listen

MODULES = {
    Role.AGENT: "emp.agent",
    Role.CONTROLLER: "emp.controller",
    Role.VOLUMES: "emp.volumes.server",
    Role.POWER: "emp.lab.bmc",
}
_VOLUME_SERVER = {"driver": "nbd", "url": f"https://{VOL.address}:{VOLUMES_PORT}", "server_name": "volumes-main"}
HOST = "127.0.0.1"
HOME = Path("/var/lib/emp")
"""of every daemon, as seen from its place"""
DISKS = "disks"
"""below it, in the volume server's place: what root volumes are made from"""
QEMU = "qemu-system-"
FIRST_PORT, LAST_PORT = 7440, 7539
"""where a port for people is looked for, below the ports that the kernel gives away by itself"""


def prepare(files: LabFiles, state: LabState, images: Sequence[Image], nfs: NfsProgram | None = None) -> bytes:
    """Give each place its own credentials, configuration and guest images; return the CA's certificate (PEM)."""
    authority = CertificateAuthority.create(files.ca, state.name)
    if state.cloud:
        region.make_credentials(files)
    if nfs is not None:
        shutil.copytree(nfs.home, files.data(VOL.name) / region.NFS_PROGRAM, symlinks=True)
    for place in state.topology.places:
        home = files.data(place.name)
        home.mkdir(parents=True, exist_ok=True)
        if place.role is None:
            continue
        name = place.name if place.is_node else "main"
        authority.issue(Identity(place.role), name, [place.address]).write(home / "pki")
        if place.is_node:
            authority.issue(Identity.QEMU, name, [place.address]).write(home / "pki-qemu")
            for image in images:
                _install(image, home / "images" / image.name)
        if place.role is Role.VOLUMES:
            _offer(images, home / DISKS)
        if place.role is not Role.CONTROLLER:  # whose configuration names a descriptor, new at each start
            _write_config(files, place, _config(files, state, place))
    Secret.new().write(files.data(CTL.name) / "token")
    return authority.ca_pem


def token(files: LabFiles) -> str:
    return Secret.read(files.data(CTL.name) / "token").reveal()


def _install(image: Image, directory: Path) -> None:
    directory.mkdir(parents=True)
    for name, source in (("kernel", image.kernel), ("initrd", image.initrd)):
        shutil.copy(source, directory / name)
        (directory / name).chmod(0o644)  # QEMU reads it as a user of its own
    record = {"name": image.name, "digest": image.digest, "kernel_command_line": KERNEL_COMMAND_LINE}
    (directory / "image.json").write_text(json.dumps(record | {"pod_ipv6": image.pod_ipv6}))


def _offer(images: Sequence[Image], directory: Path) -> None:
    """Put what root volumes are made from where the volume server looks for it."""
    directory.mkdir()
    for image in images:
        if image.disk is not None:
            argv = ["cp", "--reflink=auto", "--sparse=always", str(image.disk), str(directory / f"{image.name}.raw")]
            subprocess.run(argv, check=True)


def _config(files: LabFiles, state: LabState, place: Place) -> dict[str, Any]:
    if place.role is Role.POWER:  # which sees the machine's files
        credentials = str(files.data(place.name) / "pki")
        return {"pool": state.name, "address": place.address, "port": POWER_PORT, "credentials": credentials}
    common = {"pool": state.name, "address": place.address, "credentials": f"{HOME}/pki", "state_dir": str(HOME)}
    if place.role is Role.VOLUMES:
        cloud = region.cloud_part(files, state, HOME) if state.cloud else {}
        disks = {} if state.cloud else {"images_dir": f"{HOME}/{DISKS}"}
        return common | {"port": VOLUMES_PORT, "nbd_ports": list(NBD_PORTS)} | disks | cloud
    if place.role is Role.CONTROLLER:
        return common | {
            "port": CONTROLLER_PORT,
            "token_file": f"{HOME}/token",
            "network": {"subnet": SUBNET, "evm_first": EVM_FIRST, "evm_last": EVM_LAST}
            | {"ipv6": {"subnet": SUBNET_IPV6, "evms": EVMS_IPV6}}
            | region.network_part(state, HOME),
            "volumes": region.controller_part(state, HOME) if state.cloud else _VOLUME_SERVER,
            "efs": region.efs_part(state, HOME),
            "fencing": {"driver": "lab", "url": f"https://{BMC.address}:{POWER_PORT}", "server_name": "power-main"},
        }
    devices = {"devices": region.agent_part()} if state.cloud else {}
    return (
        common
        | devices
        | {
            "node": place.name,
            "port": AGENT_PORT,
            "link_port": LINK_PORT,
            "controller_url": f"https://{CTL.address}:{CONTROLLER_PORT}",
            "controller_name": "controller-main",
            "qemu_credentials": f"{HOME}/pki-qemu",
            "run_dir": "/run/emp",
            "images_dir": f"{HOME}/images",
            "memory_bytes": state.memory_bytes,
            "vcpus": state.vcpus,
            "network": {"driver": state.network, "bridge": BRIDGE, "uplink": UPLINK},
            "qemu": state.qemu,
        }
    )


def _config_name(role: Role) -> str:
    return f"{role}.json"


def _write_config(files: LabFiles, place: Place, config: Mapping[str, Any]) -> None:
    assert place.role is not None
    (files.data(place.name) / _config_name(place.role)).write_text(json.dumps(config, indent=1))


def people_socket(port: int | None) -> socket.socket:
    """Return a socket listening on 127.0.0.1, on ``port`` or the first free one; ``Conflict`` if it is taken."""
    if port is not None:
        return listen(HOST, port, field="port")
    for candidate in range(FIRST_PORT, LAST_PORT + 1):
        try:
            return listen(HOST, candidate, field="port")
        except Conflict:
            continue
    raise Conflict(f"no port from {FIRST_PORT} to {LAST_PORT} is free", field="port", hint="name one with --port")


def spawn(files: LabFiles, state: LabState, place: Place, people: socket.socket | None = None) -> None:
    """Start the daemon of a place; returns when it has been started, which is before it is ready.

    The controller, and its keeper if it has one, takes over ``people``; without it the lab's port is opened again. The
    caller still has to close its own copy, so that a controller that is dead for good means connection refused.
    """
    assert place.role is not None
    passed: tuple[int, ...] = ()
    opened = None
    fabric = -1
    if place.role is Role.VOLUMES and state.topology.network is Network.VPC:
        fabric = os.open(NAMESPACES / state.topology.namespace(FABRIC), os.O_RDONLY)  # whose routes the cloud sets
        passed = (fabric,)
        _write_config(files, place, _config(files, state, place) | {"fabric_fd": fabric})
    if place.role is Role.CONTROLLER:
        if people is None:
            people = opened = people_socket(state.port)
        passed = (people.fileno(),)
        _write_config(files, place, _config(files, state, place) | {"people": {"fd": people.fileno()}})
    daemon = [sys.executable, *_arguments(files, state, place)]
    # setsid --fork leaves it to process 1 of its place, which reaps it: nothing of ours stays behind.
    leave = [*_enter_argv(files, state, place), "setsid", "--fork"]
    argv = [*leave, *(keeper.command(daemon) if state.keep else daemon)]
    try:
        with files.log(place.name, place.role).open("ab") as log:
            subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
                pass_fds=passed,
                env=_environment(state, place),
            )
    finally:
        if opened is not None:
            opened.close()
        if fabric >= 0:
            os.close(fabric)


def _enter_argv(files: LabFiles, state: LabState, place: Place) -> list[str]:
    if place.role is Role.POWER:
        return ["nsenter", f"--net={NAMESPACES / state.topology.namespace(place.name)}", "--"]
    return enter_argv(init_of(files, place.name))


def _arguments(files: LabFiles, state: LabState, place: Place) -> list[str]:
    assert place.role is not None
    home = files.data(place.name) if place.role is Role.POWER else HOME
    return ["-m", _module_of(state, place.role), "--config", str(home / _config_name(place.role))]


def _module_of(state: LabState, role: Role) -> str:
    return region.MODULE if role is Role.VOLUMES and state.cloud else MODULES[role]


def _environment(state: LabState, place: Place) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG") or name.startswith("EMP_")}
    if state.faults and place.role is not Role.POWER:
        keep[faults.VARIABLE] = str(HOME / "faults")
    return keep | {"PYTHONPATH": str(source_directory()), "PYTHONUNBUFFERED": "1", "HOME": "/tmp"}


def daemons(files: LabFiles, place: Place) -> list[scan.Running]:
    """Return the live processes of a place's keeper, daemon and QEMUs, parents first."""
    if place.role is Role.POWER:
        wanted = tuple(_arguments(files, files.load(), place))
        return [found for found in scan.running(_may_be_bmc) if found.argv[-len(wanted) :] == wanted]
    inode = scan.namespace_inode(f"/proc/{init_of(files, place.name).pid}/ns/pid")
    return [] if inode is None else scan.in_pid_namespace(inode)


def _may_be_bmc(path: str) -> bool:
    try:
        return MODULES[Role.POWER].encode() in Path(path, "cmdline").read_bytes()
    except OSError:
        return False


def started(files: LabFiles, place: Place) -> bool:
    """Whether the daemon of a place is running, or about to be: also if its keeper will start it again."""
    assert place.role is not None
    module = _module_of(files.load(), place.role)
    return any(("-m", module) in pairwise(found.argv) for found in daemons(files, place))


def find(files: LabFiles, where: str, role: str) -> Process | None:
    """Return the process of ``role`` in a place; None if it is not running. A QEMU's role is ``qemu:EVM``.

    Raises ``BadInput`` for a role that is none, ``NotFound`` for a place that has no such daemon.
    """
    state = files.load()
    place = state.topology.place(where)
    kind, _, evm = role.partition(":")
    if kind == "qemu" and evm and place.is_node:
        matching = [found for found in daemons(files, place) if evm_of(found.argv) == evm]
    else:
        module = _module_of(state, daemon_role(place, role))
        matching = [found for found in daemons(files, place) if _module(found.argv) == module]
    pids = {found.pid for found in matching}
    leaders = [found.process for found in matching if found.parent not in pids]
    return leaders[0] if leaders else None


def find_keeper(files: LabFiles, place: Place) -> scan.Running | None:
    """Return the keeper of a place's daemon, or the child in which it is just starting the daemon, if there is one."""
    return next((found for found in daemons(files, place) if _module(found.argv) == keeper.MODULE), None)


def daemon_role(place: Place, role: str) -> Role:
    """Return the daemon that ``role`` names, if this place has it."""
    if role.startswith("qemu:") and role != "qemu:":
        raise NotFound(f"{place.name} runs no EVMs", field="where", hint="name a node, such as n1")
    if role not in set(Role):
        hint = "agent, controller, volumes, power, or qemu:EVM with an EVM's name"
        raise BadInput(f"{role[:40]!r} is no role", field="role", hint=hint)
    if role != place.role:
        has = f"the {place.role}" if place.role else "no daemon"
        raise NotFound(f"there is no {role} on {place.name}", field="role", hint=f"{place.name} has {has}")
    return Role(role)


def _module(argv: tuple[str, ...]) -> str | None:
    """Return the module that a Python was told to run. What follows are its arguments: a keeper's name a module too."""
    if not Path(argv[0]).name.startswith("python"):
        return None
    return next((word for option, word in pairwise(argv) if option == "-m"), None)


def evm_of(argv: tuple[str, ...]) -> str | None:
    """Return the EVM's name on a QEMU's command line (``-name guest=NAME,...`` or ``-name NAME``), else None."""
    if Path(argv[0]).name.startswith(QEMU):
        for option, value in pairwise(argv):
            if option in ("-name", "--name"):
                return value.split(",")[0].removeprefix("guest=")
    return None
