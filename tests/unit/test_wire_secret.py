"""Tokens do not show themselves and their files are private."""

from __future__ import annotations

import copy
import json
import pickle
import stat
from pathlib import Path

import pytest

from emp.model.errors import BadInput, NotFound
from emp.wire.secret import Secret


def test_a_secret_is_masked_wherever_text_is_made_of_it() -> None:
    secret = Secret("hunter2hunter2")
    shown = f"{secret} {secret!r} {secret!s:>20} {[secret]} %s" % secret
    assert "hunter2" not in shown and shown.count("***") == 5
    assert secret.reveal() == "hunter2hunter2"
    with pytest.raises(TypeError):
        json.dumps({"token": secret})
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        copy.deepcopy(secret)


def test_only_the_same_text_matches() -> None:
    secret = Secret("abcdef")
    assert secret.matches("abcdef") and secret == Secret("abcdef") and hash(secret) == hash(Secret("abcdef"))
    assert not any(secret.matches(text) for text in ("", "abcde", "abcdefg", "ABCDEF", "abcdeé", "\udcff"))
    assert secret != Secret("abcdeg") and secret != "abcdef"


def test_new_secrets_differ() -> None:
    assert len({Secret.new().reveal() for _ in range(50)}) == 50


def test_a_token_file_is_private_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "etc" / "token"
    secret = Secret.new()
    secret.write(path)
    assert Secret.read(path) == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["token"]


def test_a_token_file_that_others_read_or_that_is_empty_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(NotFound):
        Secret.read(path)
    Secret.new().write(path)
    path.chmod(0o640)
    with pytest.raises(BadInput, match=r"mode 0640.*chmod 600"):
        Secret.read(path)
    path.chmod(0o600)
    path.write_text("\n")
    with pytest.raises(BadInput, match="one word"):
        Secret.read(path)


@pytest.mark.parametrize("text", ["", "two words", "line\n", "tab\t", "é"])
def test_what_could_break_a_header_is_no_secret(text: str) -> None:
    with pytest.raises(BadInput):
        Secret(text)
