"""The guard of ``tests/leaks.py`` bites: each kind of leak, planted in a test, fails that test and is named."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

PLANTED = """
import asyncio, os, socket, subprocess, sys, time
from pathlib import Path
import pytest
from tests import leaks

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
tasks, children = [], []

async def test_task():
    tasks.append(asyncio.create_task(asyncio.Event().wait(), name="stray"))

@pytest.mark.asyncio(loop_scope="module")
async def test_task_in_a_wider_loop():
    tasks.append(asyncio.create_task(asyncio.Event().wait(), name="wide"))

async def test_no_task():
    task = asyncio.create_task(asyncio.Event().wait())
    task.cancel()

async def test_connection():
    here, there = socket.socketpair()
    children.extend((await asyncio.open_connection(sock=here), there))

def test_child():
    children.append(subprocess.Popen(SLEEP))

def test_child_without_environment():
    children.append(subprocess.Popen(SLEEP, env={}))

def test_orphan():
    again = f"import subprocess; subprocess.Popen({SLEEP!r}, start_new_session=True)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", again], check=True)

def test_zombie():
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    children.append(child)

def test_ending_child():
    child = subprocess.Popen(SLEEP)
    child.kill()
    child.wait()

def test_clean(): pass
"""

PLANTED_AS_ROOT = """
import subprocess
from pathlib import Path

def test_namespace():
    subprocess.run(["ip", "netns", "add", "stray"], check=True)

def test_tap():
    subprocess.run(["ip", "tuntap", "add", "stray0", "mode", "tap"], check=True)

def test_link():
    subprocess.run(["ip", "link", "add", "stray1", "type", "bridge"], check=True)

def test_mount(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "stray", tmp_path], check=True)

def test_clean():
    subprocess.run(["ip", "netns", "add", "tidy"], check=True)
    subprocess.run(["ip", "netns", "delete", "tidy"], check=True)
"""

PLANTED_OUTLIVING = """
import subprocess, sys
import pytest
from tests import leaks

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
NURSE = [sys.executable, "-c", f'''
import subprocess
input()
nursed = subprocess.Popen({SLEEP!r})
print(nursed.pid, flush=True)
input()
nursed.kill()
nursed.wait()
''']

@pytest.fixture(scope="module")
def lab():
    with leaks.outliving("lab"):
        lab = subprocess.Popen(NURSE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield lab
    LAST_WORD

def test_first(lab):
    lab.stdin.write("go\\n"); lab.stdin.flush()
    assert int(lab.stdout.readline()) > 0

def test_second(lab):
    assert lab.poll() is None
"""


@pytest.fixture
def plant(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Return a directory whose tests run under the same guard as ours."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    pytester.makepyprojecttoml(
        "[tool.pytest.ini_options]\nasyncio_mode = 'auto'\nasyncio_default_fixture_loop_scope = 'function'\n"
    )
    pytester.makeconftest("pytest_plugins = ['tests.isolation', 'tests.leaks']")
    return pytester


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can leave the machine's namespaces")
def test_a_session_has_namespaces_and_labs_of_its_own() -> None:
    for kind in ("net", "mnt"):
        assert Path(f"/proc/self/ns/{kind}").readlink() != Path(f"/proc/{os.getppid()}/ns/{kind}").readlink()
    assert [name for _, name in socket.if_nameindex()] == ["lo"]
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        assert os.environ["EMP_LAB_DIR"].startswith("/var/tmp/emp-tests-")


def test_a_stray_task_or_process_fails_its_test(plant: pytest.Pytester) -> None:
    plant.makepyfile(test_planted=PLANTED)
    result = plant.runpytest_subprocess("-rE", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=10, errors=7)
    result.stdout.fnmatch_lines(
        [
            "*at teardown of test_task *",
            "the test left behind: task stray:*",
            "*at teardown of test_task_in_a_wider_loop *",
            "the test left behind: task wide:*",
            "*at teardown of test_connection *",
            "the test left behind: <_SelectorSocketTransport *",
            "*at teardown of test_child *",
            "the test left behind: process *time.sleep(60)*",
            "*at teardown of test_child_without_environment *",
            "the test left behind: process *",
            "*at teardown of test_orphan *",
            "the test left behind: process *time.sleep(60)*",
            "*at teardown of test_zombie *",
            "the test left behind: process *, dead and never waited for",
        ]
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces, links and mounts")
def test_a_stray_namespace_link_or_mount_fails_its_test(plant: pytest.Pytester) -> None:
    plant.makepyfile(test_planted=PLANTED_AS_ROOT)
    result = plant.runpytest_subprocess("-rE", "-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(
        [
            "*at teardown of test_namespace *",
            "the test left behind: network namespace stray",
            "*at teardown of test_tap *",
            "the test left behind: network link stray0",
            "*at teardown of test_link *",
            "the test left behind: network link stray1",
            "*at teardown of test_mount *",
            "the test left behind: mount *",
            "*the session left behind: network namespace stray; network link stray0; network link stray1; mount *",
        ]
    )
    result.assert_outcomes(passed=5, errors=5)


def test_what_a_wider_fixture_keeps_is_not_held_against_a_test(plant: pytest.Pytester) -> None:
    plant.makepyfile(test_planted=PLANTED_OUTLIVING.replace("LAST_WORD", 'lab.communicate("end\\n")'))
    plant.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=2)


def test_what_a_wider_fixture_forgets_fails_the_session(plant: pytest.Pytester) -> None:
    plant.makepyfile(test_planted=PLANTED_OUTLIVING.replace("LAST_WORD", "pass"))
    result = plant.runpytest_subprocess("-rE", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*the session left behind: process *"])
