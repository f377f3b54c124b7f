"""Contexts: which pool is meant, and who may read how to reach it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from emp.client import context
from emp.client.context import Context, list_contexts, load_context, remove_context, save_context
from emp.model.errors import AlreadyExists, BadInput, NotFound
from emp.wire.secret import Secret

HERE = Context("here", "https://127.0.0.1:7440", "controller-main", "PEM", Secret("sesame"))


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("EMP_CONTEXT", "SUDO_UID", "SUDO_USER", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EMP_CONTEXT_DIR", str(tmp_path / "emp" / "contexts"))
    return tmp_path / "emp" / "contexts"


def test_a_saved_context_comes_back_and_is_private(directory: Path) -> None:
    path = save_context(HERE)
    assert load_context("here") == HERE
    assert path == directory / "here.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700
    assert "sesame" not in repr(load_context("here"))


def test_the_only_context_is_the_default() -> None:
    save_context(HERE)
    assert load_context() == HERE


def test_without_any_context_the_user_is_told_what_to_do() -> None:
    with pytest.raises(BadInput, match="emp lab up"):
        load_context()


def test_among_several_one_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    save_context(HERE)
    save_context(dataclasses.replace(HERE, name="there"))
    assert list_contexts() == ["here", "there"]
    with pytest.raises(BadInput, match=r"here, there.*--context"):
        load_context()
    monkeypatch.setenv("EMP_CONTEXT", "there")
    assert load_context().name == "there"
    assert load_context("here").name == "here"


def test_an_unknown_context_gets_told_which_there_are() -> None:
    save_context(HERE)
    with pytest.raises(NotFound, match="contexts: here"):
        load_context("gone")


@pytest.mark.parametrize("name", ["../here", "a,b=c", "x" * 300])
def test_bad_names_reach_no_path(name: str) -> None:
    save_context(HERE)
    with pytest.raises(BadInput, match="not a valid name"):
        load_context(name)


def test_a_context_is_never_overwritten() -> None:
    save_context(HERE)
    with pytest.raises(AlreadyExists, match="here"):
        save_context(dataclasses.replace(HERE, url="https://192.0.2.1:1"))
    assert load_context("here") == HERE


def test_a_context_that_others_can_read_is_refused() -> None:
    save_context(HERE).chmod(0o644)
    with pytest.raises(BadInput, match="chmod 600"):
        load_context("here")


def test_a_damaged_context_says_so() -> None:
    path = save_context(HERE)
    path.write_text('{"url": "https://127.0.0.1:1"}')
    with pytest.raises(BadInput, match="damaged"):
        load_context("here")


def test_removing_leaves_no_directory_and_may_be_repeated(directory: Path) -> None:
    path = save_context(HERE)
    remove_context(path)
    remove_context(path)
    assert not directory.parent.exists()
    assert directory.parent.parent.exists()


def test_directories_that_were_made_for_it_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMP_CONTEXT_DIR")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home" / "config"))
    made = context.missing_directories()
    assert made[0] == tmp_path / "home"
    remove_context(save_context(HERE), made=made)
    assert not made[0].exists()
    assert tmp_path.exists()


def test_removing_one_leaves_the_others() -> None:
    save_context(dataclasses.replace(HERE, name="there"))
    remove_context(save_context(HERE))
    assert list_contexts() == ["there"]


@pytest.mark.skipif(os.geteuid() != 0, reason="root makes the file for another")
def test_under_sudo_the_file_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caller = type("Caller", (), {"pw_uid": 12345, "pw_gid": 23456, "pw_dir": str(tmp_path)})()
    monkeypatch.delenv("EMP_CONTEXT_DIR")
    monkeypatch.setenv("SUDO_UID", "12345")
    monkeypatch.setattr("pwd.getpwuid", {12345: caller}.__getitem__)
    path = save_context(HERE)
    assert path == tmp_path / ".config" / "emp" / "contexts" / "here.json"
    for made in (path, path.parent, path.parent.parent, path.parent.parent.parent):
        assert (made.stat().st_uid, made.stat().st_gid) == (12345, 23456)
