"""What is on disk of a lab, its lock, and which lab is meant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from emp.lab.state import LabFiles, LabState, chosen, lab_names
from emp.model.errors import BadInput, Conflict, NotFound


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("EMP_CONTEXT", raising=False)
    monkeypatch.setenv("EMP_LAB_DIR", str(tmp_path / "labs"))
    return tmp_path / "labs"


def make(name: str) -> LabFiles:
    files = LabFiles(name)
    with files.locked(create=True):
        files.save(
            LabState(
                name=name, nodes=2, port=7440, memory_bytes=1, vcpus=1, qemu=None, context="/x", made=[], created_at=0.0
            )
        )
    return files


def test_state_comes_back() -> None:
    assert make("one").load().topology.namespace("n1") == "emp-one-n1"


def test_removal_leaves_nothing_with_the_last_lab(base: Path) -> None:
    one, two = make("one"), make("two")
    with one.locked():
        one.empty()
    assert lab_names() == ["two"]
    with two.locked():
        two.empty()
    assert not base.exists()


def test_an_unknown_lab_gets_told_which_there_are() -> None:
    make("one")
    with pytest.raises(NotFound, match="labs on this machine: one"):
        LabFiles("two").load()


def test_the_only_lab_is_meant_by_default() -> None:
    with pytest.raises(NotFound, match="emp lab up"):
        chosen(None)
    make("one")
    assert chosen(None).name == "one"


def test_among_several_labs_the_name_or_the_context_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    make("one")
    make("two")
    with pytest.raises(BadInput, match=r"one, two.*--name"):
        chosen(None)
    monkeypatch.setenv("EMP_CONTEXT", "two")
    assert chosen(None).name == "two"
    assert chosen("one").name == "one"


@pytest.mark.parametrize("name", ["../x", "a,b=c", "x" * 300])
def test_bad_names_reach_no_path(name: str) -> None:
    with pytest.raises(BadInput, match="not a valid name"):
        chosen(name)


def test_a_second_command_on_the_lab_waits_then_says_so() -> None:
    files = make("one")
    with files.locked(), pytest.raises(Conflict, match="another command"), files.locked(wait_s=0.1):
        pytest.fail("both have the lock")
    with files.locked(wait_s=0.1):
        pass


def test_a_child_that_inherits_the_lock_holds_it() -> None:
    files = make("one")
    with files.locked() as lock:
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=(lock,)
        )
    with pytest.raises(Conflict), files.locked(wait_s=0.1):
        pytest.fail("the child has lost the lock")
    child.communicate()
    with files.locked(wait_s=5):
        pass


def test_a_lock_on_a_directory_that_was_removed_meanwhile_is_no_lock(base: Path) -> None:
    files = make("one")
    script = (
        "import sys; from emp.lab.state import LabFiles\n"
        "files = LabFiles('one')\n"
        "with files.locked():\n"
        "    print('locked', flush=True); sys.stdin.read(); files.empty()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, close_fds=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(Conflict), files.locked(wait_s=0.2):
        pytest.fail("both have the lock")
    child.communicate()
    with files.locked(create=True):
        assert files.directory.is_dir()
    assert not files.directory.exists()


def test_there_is_nothing_to_lock_without_the_lab() -> None:
    with pytest.raises(NotFound), LabFiles("one").locked():
        pytest.fail("locked what is not there")


def test_a_lab_that_another_version_made_can_still_be_loaded() -> None:
    files = make("old")
    stored = json.loads(files.state_file.read_text())
    del stored["made"]
    files.state_file.write_text(json.dumps({**stored, "colour": "blue"}))
    assert files.load().made == []
