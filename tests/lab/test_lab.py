"""Labs as a user meets them: made, looked at, broken, and cleared whatever was killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emp.client import context as contexts
from emp.lab import places, scan, verbs
from emp.lab.daemons import daemons
from emp.lab.isolation import violations
from emp.lab.kernel import CLONE_NEWNS, attach_tree, clone_tree, join_namespace, mounts
from emp.lab.state import LabFiles, lab_names
from emp.lab.topology import Topology
from emp.wire.pki import Credentials
from tests.lab.conftest import LAB, NODES, Evm, Pool, run_lab

NAME = "own"


@pytest.fixture
def cleared(lab_home: Path) -> Iterator[LabFiles]:
    """A test's own lab, which need not exist; gone afterwards even if the test fails."""
    files = LabFiles(NAME)
    yield files
    run_lab("down", "--name", NAME)
    assert not files.directory.exists()


def namespaces() -> set[str]:
    return {path.name for path in places.NAMESPACES.glob("emp-*")}


def nothing_is_left_of(name: str) -> bool:
    files = LabFiles(name)
    return (
        not (namespaces() & set(Topology(name, NODES).namespaces))
        and not places.inits(files)
        and not files.directory.exists()
        and not contexts.file_of(name).exists()
    )


# ---- what a place can see of another --------------------------------------------------------------------------------

LEAVE_MARKS = """
import os, socket, sys, time
name = sys.argv[1]
kept = []
for directory in ("/run", "/tmp", "/var/tmp", "/var/lib", "/var/lib/emp", "/dev/shm", "/dev"):
    path = f"{directory}/{name}"
    open(path, "w").close()
    one = socket.socket(socket.AF_UNIX)
    one.bind(path + ".sock")
    one.listen()
    kept.append(one)
abstract = socket.socket(socket.AF_UNIX)
abstract.bind("\\0" + name)
abstract.listen()
print("marked", flush=True)
sys.stdin.read()
"""

FIND_MARKS = """
import json, os, socket, subprocess, sys
name = sys.argv[1]
found = []
for top in ("/run", "/tmp", "/var", "/dev", "/srv", "/opt", "/mnt", "/home"):
    for directory, _, files in os.walk(top, onerror=lambda error: None):
        found += [f"{directory}/{file}" for file in files if name in file]
for process in os.listdir("/proc"):
    if process.isdigit() and process != str(os.getpid()):
        try:
            command = open(f"/proc/{process}/cmdline", "rb").read()
        except OSError:
            continue
        if name.encode() in command:
            found.append(f"process {process}")
try:
    socket.socket(socket.AF_UNIX).connect("\\0" + name)
    found.append("an abstract socket")
except OSError:
    pass
if name in open("/proc/net/unix").read():
    found.append("/proc/net/unix")
print(json.dumps(found))
"""


def test_nothing_of_one_place_is_visible_in_another(pool: Pool) -> None:
    mark = "mark-of-n1"
    marking = subprocess.Popen(
        verbs.command_in(pool.files, "n1", [sys.executable, "-c", LEAVE_MARKS, mark]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert marking.stdout is not None
    assert marking.stdout.readline() == "marked\n"
    seen = {
        where: json.loads(pool.run_in(where, sys.executable, "-c", FIND_MARKS, mark).stdout)
        for where in ("n1", "n2", "n3", "ctl", "vol", "client", "bmc")
    }
    marking.communicate()
    pool.run_in("n1", "sh", "-c", f"rm -f /var/lib/emp/{mark}*")
    assert len(seen.pop("n1")) > 15  # the search does find them where they are
    assert not any(seen.values()), seen


def test_places_share_nothing_but_the_network(pool: Pool, new_evm: Callable[..., Evm]) -> None:
    evm = new_evm("--node", "n1", "--pod", "p", "--volume", "io2:16MiB")
    assert violations(pool.files) == []
    pool.emp("migrate", evm.name, "--to", "n2")
    assert violations(pool.files) == []
    assert [place.name for place in verbs.status(pool.files) if evm.name in place.evms] == ["n2"]


def in_mounts_of(pool: Pool, where: str, action: Callable[[], None]) -> None:
    """Run ``action`` in the mount namespace of a place, in a process of its own."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            join_namespace(f"/proc/{places.init_of(pool.files, where).pid}/ns/mnt", CLONE_NEWNS)
            action()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_planted_shared_directory_is_found(pool: Pool, tmp_path: Path) -> None:
    trees = {where: clone_tree(str(tmp_path)) for where in ("n1", "n2")}

    def plant(where: str) -> None:
        Path("/run/planted").mkdir()
        attach_tree(trees[where], "/run/planted")

    try:
        for where in trees:
            in_mounts_of(pool, where, lambda where=where: plant(where))  # type: ignore[misc]
        found = violations(pool.files)
    finally:
        for where, tree in trees.items():
            os.close(tree)
            pool.run_in(where, "sh", "-c", "umount /run/planted; rmdir /run/planted")
    assert sorted(found) == [
        "n1 sees at /run/planted what n2 writes at /run/planted",
        "n2 sees at /run/planted what n1 writes at /run/planted",
    ]
    assert violations(pool.files) == []


def test_a_planted_pipe_is_found(pool: Pool) -> None:
    ends = os.pipe()
    waiting = "import sys; sys.stdin.read()"
    children = [
        subprocess.Popen(
            verbs.command_in(pool.files, where, [sys.executable, "-c", waiting, "ready"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(end,),
        )
        for where, end in zip(("n1", "n2"), ends, strict=True)
    ]
    try:
        deadline = time.monotonic() + 10
        while not (found := violations(pool.files)) and time.monotonic() < deadline:
            time.sleep(0.05)  # until both have entered their place
    finally:
        for end in ends:
            os.close(end)
        for child in children:
            child.communicate()
    assert len(found) == 1
    assert found[0].startswith("n1 and n2 both hold pipe:")


def test_a_planted_cable_is_found(pool: Pool) -> None:
    one, other = pool.topology.namespace("n1"), pool.topology.namespace("n2")
    subprocess.run(
        ["ip", "-n", one, "link", "add", "short", "type", "veth", "peer", "name", "cut", "netns", other], check=True
    )
    try:
        found = violations(pool.files)
    finally:
        subprocess.run(["ip", "-n", one, "link", "delete", "short"], check=True)
    assert sorted(found) == [
        "n1 has an interface short (veth) beside eth0",
        "n2 has an interface cut (veth) beside eth0",
    ]


def test_each_place_has_its_own_credentials_only(pool: Pool) -> None:
    expected = {
        "ctl": {"controller-main"},
        "vol": {"volumes-main"},
        "bmc": {"power-main"},
        "n1": {"agent-n1", "qemu-n1"},
        "n2": {"agent-n2", "qemu-n2"},
        "client": set(),
    }
    for where, names in expected.items():
        keys = pool.run_in(where, "grep", "-rl", "PRIVATE KEY", "/var/lib", "/run", "/tmp", check=False).stdout.split()
        checkout = str(Path(__file__).parents[2])  # readable in every place, wherever it lies
        keys = [key for key in keys if not key.startswith(checkout)]
        homes = {Path(key).parent for key in keys if "/run/emp/" not in key}  # there QEMUs have copies of theirs
        data = pool.files.data(where)
        found = {str(Credentials.load(data / home.relative_to("/var/lib/emp")).identity) for home in homes}
        assert found == names, where


# ---- being there -----------------------------------------------------------------------------------------------------


def test_the_pool_answers_people_on_this_machine(pool: Pool) -> None:
    context = pool.context
    assert context.url == f"https://127.0.0.1:{pool.state.port}"
    tls = ssl.create_default_context(cadata=context.ca_pem)
    plain = socket.create_connection(("127.0.0.1", pool.state.port))
    with tls.wrap_socket(plain, server_hostname=context.server_name) as secured:
        secured.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert secured.recv(4096).startswith(b"HTTP/1.1 200")


def test_no_address_is_added_to_this_machine(pool: Pool) -> None:
    assert "10.77." not in subprocess.run(["ip", "addr"], capture_output=True, text=True, check=True).stdout


def test_status_and_list_show_every_place(pool: Pool) -> None:
    status = json.loads(run_lab("status", "--name", pool.name, "--json").stdout)
    assert status["state"] == "up"
    assert {place["name"]: place["state"] for place in status["places"]} == dict.fromkeys(
        ("ctl", "vol", "client", "bmc", "n1", "n2", "n3"), "running"
    )
    assert [lab["name"] for lab in json.loads(run_lab("list", "--json").stdout)["items"]] == [pool.name]
    text = run_lab("status", "--name", pool.name).stdout
    assert max(map(len, text.splitlines())) <= 80


def test_exec_runs_in_the_place_and_returns_its_status(pool: Pool) -> None:
    for where in ("n1", "client", "ctl"):
        assert run_lab("exec", "--name", pool.name, where, "--", "hostname").stdout == f"{where}\n"
    failed = run_lab("exec", "--name", pool.name, "n1", "--", "sh", "-c", "exit 7", check=False)
    assert failed.returncode == 7
    addresses = run_lab("exec", "--name", pool.name, "n2", "--", "ip", "-br", "-4", "addr", "show", "br0").stdout
    assert "10.77.0.12/16" in addresses


def test_places_reach_each_other_by_ip_only_over_the_fabric(pool: Pool) -> None:
    script = "import socket; socket.create_connection(('10.77.0.2', 7440), 5).close()"
    for where in ("n1", "client", "vol"):
        pool.run_in(where, sys.executable, "-c", script)
    subprocess.run(["ip", "-n", pool.topology.namespace("fabric"), "link", "set", "client", "down"], check=True)
    try:
        assert pool.run_in("client", sys.executable, "-c", script, check=False).returncode
    finally:
        subprocess.run(["ip", "-n", pool.topology.namespace("fabric"), "link", "set", "client", "up"], check=True)


def test_fsync_in_a_place_reaches_a_disk(pool: Pool) -> None:
    kind = pool.run_in("n1", "stat", "--file-system", "--format", "%T", "/var/lib/emp").stdout.strip()
    assert kind != "tmpfs"


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_a_dead_controller_refuses_connections_and_starts_again_on_its_port(pool: Pool) -> None:
    run_lab("kill", "--name", pool.name, "ctl", "controller")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", pool.state.port), 5)
    again = run_lab("kill", "--name", pool.name, "ctl", "controller", check=False)
    assert (again.returncode, "not running" in again.stderr) == (3, True)
    pool.start("ctl", "controller")
    socket.create_connection(("127.0.0.1", pool.state.port), 5).close()


def test_an_agent_is_frozen_thawed_killed_and_started(pool: Pool) -> None:
    def state() -> str:
        return next(place.state for place in verbs.status(pool.files) if place.name == "n3")

    run_lab("stop", "--name", pool.name, "n3", "agent")
    assert state() == "frozen"
    run_lab("cont", "--name", pool.name, "n3", "agent")
    assert state() == "running"
    run_lab("kill", "--name", pool.name, "n3", "agent")
    assert state() == "dead"
    pool.start("n3", "agent")
    assert state() == "running"
    twice = run_lab("start", "--name", pool.name, "n3", "agent", check=False)
    assert (twice.returncode, "runs on n3" in twice.stderr) == (4, True)


def test_an_evms_qemu_is_found_by_name_and_killed(pool: Pool, new_evm: Callable[..., Evm]) -> None:
    evm, other = new_evm("--node", "n1"), new_evm("--node", "n1")
    run_lab("kill", "--name", pool.name, "n1", f"qemu:{evm.name}")
    assert [place.evms for place in verbs.status(pool.files) if place.name == "n1"] == [(other.name,)]


@pytest.mark.parametrize(
    ("verb", "where", "role", "status", "says"),
    [
        ("kill", "n9", "agent", 3, "there are ctl, vol, client, bmc, n1"),
        ("kill", "n1", "controller", 3, "n1 has the agent"),
        ("kill", "client", "agent", 3, "client has no daemon"),
        ("stop", "n1", "kernel", 2, "agent, controller, volumes, power, or qemu:EVM"),
        ("stop", "n1", "qemu:", 2, "qemu:EVM"),
        ("kill", "n1", "qemu:nobody", 3, "not running"),
        ("kill", "ctl", "qemu:web", 3, "runs no EVMs"),
        ("start", "n1", "qemu:web", 2, "emp evm start"),
    ],
)
def test_faults_that_make_no_sense_are_explained(
    pool: Pool, verb: str, where: str, role: str, status: int, says: str
) -> None:
    done = run_lab(verb, "--name", pool.name, where, role, check=False)
    assert done.returncode == status
    assert says in done.stderr


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_second_lab_of_the_same_name_is_refused(pool: Pool) -> None:
    done = run_lab("up", "--name", pool.name, check=False)
    assert done.returncode == 4
    assert f"emp lab down --name {pool.name}" in done.stderr
    assert verbs.status(pool.files)[0].state == "running"


@pytest.mark.parametrize("name", ["../x", "a,b=c", "x" * 300, "UPPER"])
@pytest.mark.parametrize("verb", [["up"], ["down"], ["status"], ["exec", "n1", "true"]])
def test_invalid_names_are_refused(lab_home: Path, name: str, verb: list[str]) -> None:
    done = run_lab(verb[0], "--name", name, *verb[1:], check=False)
    assert done.returncode == 2
    assert "not a valid name" in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--memory", "12Q"], "not a size"), (["--nodes", "0"], "0 nodes"), (["--port", "99999"], "port")],
)
def test_invalid_options_are_refused(cleared: LabFiles, options: list[str], says: str) -> None:
    done = run_lab("up", "--name", NAME, *options, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert nothing_is_left_of(NAME)


def test_a_taken_port_is_named(cleared: LabFiles) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run_lab("up", "--name", NAME, "--port", str(port), check=False)
    assert done.returncode == 4
    assert f"127.0.0.1:{port} is already taken" in done.stderr
    assert nothing_is_left_of(NAME)


def test_a_namespace_of_somebody_else_is_left_alone(cleared: LabFiles) -> None:
    theirs = f"emp-{NAME}-n1"
    subprocess.run(["ip", "netns", "add", theirs], check=True)
    try:
        done = run_lab("up", "--name", NAME, check=False)
        assert namespaces() >= {theirs}
    finally:
        subprocess.run(["ip", "netns", "delete", theirs], check=True)
    assert done.returncode == 4
    assert f"{theirs} is already taken" in done.stderr
    assert nothing_is_left_of(NAME)


def test_a_context_of_another_pool_is_left_alone(cleared: LabFiles) -> None:
    theirs = contexts.file_of(NAME)
    theirs.parent.mkdir(parents=True, exist_ok=True)
    theirs.write_text("of another pool")
    try:
        done = run_lab("up", "--name", NAME, check=False)
        assert theirs.read_text() == "of another pool"
    finally:
        theirs.unlink()
    assert done.returncode == 4
    assert "context" in done.stderr
    assert nothing_is_left_of(NAME)


def test_a_missing_qemu_is_named_before_anything_is_made(cleared: LabFiles) -> None:
    done = run_lab("up", "--name", NAME, check=False, EMP_QEMU="/nowhere/qemu")
    assert done.returncode == 10
    assert "/nowhere/qemu is no program" in done.stderr
    assert nothing_is_left_of(NAME)


def test_a_lab_that_does_not_exist_is_named(lab_home: Path) -> None:
    for verb in (["status"], ["exec", "n1", "true"], ["kill", "n1", "agent"]):
        done = run_lab(verb[0], "--name", "nobody", *verb[1:], check=False)
        assert (done.returncode, "there is no lab 'nobody'" in done.stderr) == (3, True)
    assert run_lab("down", "--name", "nobody").stdout == "There is no such lab: nothing to remove.\n"


def test_a_daemon_that_does_not_start_is_shown_with_its_log(cleared: LabFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    from emp.lab import daemons, up
    from emp.lab.topology import Role
    from emp.model.errors import HostError

    monkeypatch.setitem(daemons.MODULES, Role.VOLUMES, "emp.nothing.of.this.name")
    with pytest.raises(HostError, match="volumes on vol ended as it started") as caught:
        up.up(up.Options(NAME, 1))
    assert "No module named" in str(caught.value)
    assert nothing_is_left_of(NAME)


# ---- killed at any moment --------------------------------------------------------------------------------------------

MOMENTS: dict[str, Callable[[LabFiles], bool]] = {
    "before its state is written": lambda files: files.directory.is_dir(),
    "when its state is written": lambda files: files.state_file.exists(),
    "with some namespaces": lambda files: len(namespaces() & set(Topology(NAME, NODES).namespaces)) >= 2,
    "with some places": lambda files: bool(places.inits(files)),
    "with some daemons": lambda files: any(files.directory.glob("logs/*.log")),
    "when it waits": lambda files: contexts.file_of(NAME).exists(),
}


@pytest.mark.parametrize(
    ("moment", "after"),
    [*((moment, "down") for moment in MOMENTS), ("with some namespaces", "up"), ("when it waits", "up")],
)
def test_up_is_killed(cleared: LabFiles, moment: str, after: str) -> None:
    killed = subprocess.Popen([*LAB, "up", "--name", NAME, "--nodes", str(NODES)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not MOMENTS[moment](cleared) and time.monotonic() < deadline:
        time.sleep(0.001)  # the file system tells nobody
    killed.kill()
    killed.wait()
    if after == "up":
        run_lab("up", "--name", NAME, "--nodes", "1")
        assert {place.state for place in verbs.status(cleared)} == {"running"}
    run_lab("down", "--name", NAME)
    assert nothing_is_left_of(NAME)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["with some namespaces", "with some daemons"])
def test_up_is_interrupted_and_leaves_nothing(cleared: LabFiles, moment: str, number: signal.Signals) -> None:
    interrupted = subprocess.Popen([*LAB, "up", "--name", NAME], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not MOMENTS[moment](cleared) and time.monotonic() < deadline:
        time.sleep(0.001)  # the file system tells nobody
    interrupted.send_signal(number)
    assert interrupted.wait(timeout=20) != 0
    assert nothing_is_left_of(NAME)


WIRE_AND_UNWIRE = """
import sys
from emp.lab import places
from emp.lab.topology import Topology
topology = Topology(sys.argv[1], 1)
places.wire(topology)
places.unwire(topology)
"""


@pytest.mark.parametrize(
    ("victims", "after"),
    [("one agent", "up"), ("every daemon", "down"), ("everything", "down"), ("everything", "up")],
)
def test_daemons_are_killed(cleared: LabFiles, victims: str, after: str) -> None:
    run_lab("up", "--name", NAME, "--nodes", "2")
    topology = cleared.load().topology
    inits = places.inits(cleared)
    if victims == "one agent":
        verbs.kill(cleared, "n2", "agent")
    elif victims == "every daemon":
        pids = {init.pid for init in inits.values()}
        for place in topology.places:
            scan.kill(found.process for found in daemons(cleared, place) if found.pid not in pids)
    else:
        scan.kill(inits.values())
    if after == "up":
        said = run_lab("up", "--name", NAME, "--nodes", "1").stderr
        assert "broken" in said
        assert {place.state for place in verbs.status(cleared)} == {"running"}
    run_lab("down", "--name", NAME)
    assert nothing_is_left_of(NAME)


def test_down_is_killed_and_repeated(cleared: LabFiles) -> None:
    run_lab("up", "--name", NAME, "--nodes", "2")
    for delay_s in (0.0, 0.01, 0.03):
        killed = subprocess.Popen([*LAB, "down", "--name", NAME], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while places.inits(cleared) and killed.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)  # until it has begun
        time.sleep(delay_s)
        killed.kill()
        killed.wait()
    run_lab("down", "--name", NAME)
    assert nothing_is_left_of(NAME)


def test_a_stranger_in_the_labs_network_does_not_keep_it_alive(cleared: LabFiles) -> None:
    run_lab("up", "--name", NAME, "--nodes", "1")
    stranger = subprocess.Popen(["ip", "netns", "exec", f"emp-{NAME}-n1", "sleep", "1000"])
    deadline = time.monotonic() + 10
    inode = scan.namespace_inode(places.NAMESPACES / f"emp-{NAME}-n1")
    while scan.namespace_inode(f"/proc/{stranger.pid}/ns/net") != inode and time.monotonic() < deadline:
        time.sleep(0.01)  # until it is inside
    reaper = subprocess.Popen([*LAB, "down", "--name", NAME], stdout=subprocess.DEVNULL)
    assert stranger.wait(timeout=20) == -signal.SIGKILL
    assert reaper.wait(timeout=20) == 0
    assert nothing_is_left_of(NAME)


def test_what_others_have_mounted_where_namespaces_are_named_stays(lab_home: Path) -> None:
    """To remove a directory detaches what other mount namespaces have mounted there."""
    script = f"umount --lazy {places.NAMESPACES} && exec {sys.executable} -c '{WIRE_AND_UNWIRE}' {NAME}"
    subprocess.run(["unshare", "--mount", "sh", "-c", script], check=True)  # for whom it is a mere directory
    assert any(mount.point == str(places.NAMESPACES) for mount in mounts())


STRANGER_MEANWHILE = """
import subprocess, sys
from emp.lab import places
from emp.lab.topology import Topology
topology = Topology(sys.argv[1], 1)
places.wire(topology)
subprocess.run(["ip", "netns", "add", "stranger"], check=True)
for _ in range(5):  # the kernel has cleared the old network before we come to it, or has not
    places.rewire(topology, topology.place("n1"))
places.unwire(topology)
print(*(path.name for path in places.NAMESPACES.iterdir()))
"""


def test_the_first_named_namespace_of_a_stranger_is_made_while_a_lab_is_up(lab_home: Path) -> None:
    """The first ``ip netns add`` on a machine mounts the directory on itself, over what was mounted in it before."""
    script = f"mount -t tmpfs none /run && exec {sys.executable} -c '{STRANGER_MEANWHILE}' {NAME}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("stranger\n", 0), done.stderr


# ---- several ---------------------------------------------------------------------------------------------------------


def test_two_labs_side_by_side(pool: Pool, cleared: LabFiles) -> None:
    run_lab("up", "--name", NAME, "--nodes", "1")
    assert lab_names() == sorted([NAME, pool.name])
    assert cleared.load().port != pool.state.port
    unclear = run_lab("status", check=False)
    assert (unclear.returncode, "--name" in unclear.stderr) == (2, True)
    assert json.loads(run_lab("status", "--json", EMP_CONTEXT=NAME).stdout)["name"] == NAME
    run_lab("down", "--name", NAME)
    assert {place.state for place in verbs.status(pool.files)} == {"running"}


def test_two_ups_of_one_name_at_the_same_time(cleared: LabFiles) -> None:
    both = [subprocess.Popen([*LAB, "up", "--name", NAME, "--nodes", "1"], stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [one.communicate(timeout=60)[1].decode() for one in both]
    assert sorted(one.returncode for one in both) == [0, 4], outputs


def test_three_nodes_are_up_in_time(cleared: LabFiles) -> None:
    """The figure is printed for a reader; the bound only catches a lab that waits in vain for something."""
    began = time.monotonic()
    run_lab("up", "--name", NAME, "--nodes", "3")
    took_s = time.monotonic() - began
    print(f"emp lab up --nodes 3: {took_s:.1f} s")
    assert took_s < 60
