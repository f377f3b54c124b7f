"""Process 1 of a place: moves into namespaces of its own, furnishes them, then sleeps and reaps.

Started as ``python -S -m emp.lab.init SPEC``; SPEC is a JSON file, see ``Spec``. The command returns once the place is
ready; its process 1 stays, under the title ``emp.lab.init SPEC``, by which the lab finds it again without any record.
Its death takes every process of the place along, like pulling the plug.

Inside, the machine's file system is there but read-only; /run, /tmp, /var/tmp, /var/lib, /dev, /sys and /proc are the
place's own, and of /var/lib only /var/lib/emp is on disk (so that fsync means something): the directory ``data``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn, TypedDict

from emp.lab.kernel import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    MNT_DETACH,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    attach_tree,
    clone_tree,
    join_namespace,
    mount,
    mounts,
    set_read_only,
    unmount,
    unshare,
)

MODULE = "emp.lab.init"
DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "kvm", "net/tun")
SCRATCH = {"/run": "0755", "/tmp": "1777", "/var/tmp": "1777", "/var/lib": "0755"}
PRIVATE = (*SCRATCH, "/dev", "/sys", "/proc")


class Spec(TypedDict):
    """What a place is made of; every path is absolute."""

    place: str
    """also its host name"""
    network: str
    """file of its network namespace"""
    data: str
    """directory that becomes /var/lib/emp"""
    keep: list[str]
    """directories to be readable inside although they lie below a private one (a checkout in /tmp)"""
    hide: list[str]
    """directories that must not be seen inside, wherever they lie"""


def title(spec_path: str) -> str:
    """Return the first word of the command line of the process 1 made from ``spec_path``."""
    return f"{MODULE} {spec_path}"


def below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def main(spec_path: str) -> int:
    """Make the place; return 0 once it is ready."""
    spec: Spec = json.loads(Path(spec_path).read_text())
    sleep = shutil.which("sleep") or "/usr/bin/sleep"
    listen, tell = os.pipe()  # closed on exec: end of file means that all went well
    try:
        join_namespace(spec["network"], CLONE_NEWNET)
        unshare(
            CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
        )  # the PID namespace begins with the next child
    except OSError as error:
        return _fail(spec, str(error))
    if os.fork() == 0:
        os.close(listen)
        _become_init(spec, spec_path, sleep, tell)
    os.close(tell)
    with os.fdopen(listen) as answer:
        problem = answer.read()
    return _fail(spec, problem) if problem else 0


def _fail(spec: Spec, problem: str) -> int:
    print(f"place {spec['place']}: {problem}", file=sys.stderr)
    return 1


def _become_init(spec: Spec, spec_path: str, sleep: str, tell: int) -> NoReturn:
    try:
        os.setsid()
        os.umask(0o022)
        _furnish(spec)
        os.chdir("/")
        nothing = os.open("/dev/null", os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - numbers, not paths
            if int(name) > 2 and int(name) != tell:
                _close_on_exec(int(name))
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # kept over exec: the kernel reaps orphans by itself
        os.execv(sleep, [title(spec_path), "infinity"])
    except OSError as error:
        os.write(tell, str(error).encode())
    os._exit(1)


def _close_on_exec(descriptor: int) -> None:
    try:
        os.set_inheritable(descriptor, False)
    except OSError:
        return  # the listing's own descriptor, closed by now


def _furnish(spec: Spec) -> None:
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    socket.sethostname(spec["place"])
    data = clone_tree(spec["data"])
    kept = {path: clone_tree(path) for path in spec["keep"]}
    devices = {name: Path("/dev", name).stat() for name in DEVICES if Path("/dev", name).exists()}
    before = mounts()
    set_read_only("/", recursive=True)
    for private in PRIVATE:
        for old in before:
            if below(old.point, private):
                _detach(old.point)
    for path, mode in SCRATCH.items():
        if Path(path).is_dir():
            mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, f"mode={mode}")
    _make_devices(devices)
    mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY)
    _mount_proc()
    Path("/var/lib/emp").mkdir()
    attach_tree(data, "/var/lib/emp")
    for path, tree in kept.items():
        set_read_only(tree)
        Path(path).mkdir(parents=True, exist_ok=True)
        attach_tree(tree, path)
    for path in spec["hide"]:
        if Path(path).is_dir():
            mount("tmpfs", path, "tmpfs", MS_RDONLY, "mode=0000")


def _detach(point: str) -> None:
    try:
        unmount(point, MNT_DETACH)
    except OSError:
        return  # it went with the mount above it


def _make_devices(devices: dict[str, os.stat_result]) -> None:
    mount("tmpfs", "/dev", "tmpfs", MS_NOSUID, "mode=0755")
    umask = os.umask(0)
    for name, status in devices.items():
        node = Path("/dev", name)
        node.parent.mkdir(mode=0o755, exist_ok=True)
        os.mknod(node, status.st_mode, status.st_rdev)
        os.chown(node, status.st_uid, status.st_gid)
    Path("/dev/pts").mkdir(mode=0o755)
    Path("/dev/shm").mkdir(mode=0o1777)
    os.umask(umask)
    mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620")
    mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    Path("/dev/ptmx").symlink_to("pts/ptmx")
    Path("/dev/fd").symlink_to("/proc/self/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        Path("/dev", name).symlink_to(f"/proc/self/fd/{number}")


def _mount_proc() -> None:
    """Mount the place's own /proc. The machine's kernel settings in it are read-only, but for those of the network,
    which every network namespace has of its own."""
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("/proc/sys", "/proc/sys", flags=MS_BIND)
    mount("/proc/sys/net", "/proc/sys/net", flags=MS_BIND)
    set_read_only("/proc/sys")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
