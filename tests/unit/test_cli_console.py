"""``emp evm console``: bytes both ways, between pipes and at a terminal."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from emp.model.evm import EvmState
from tests.unit.test_cli_canned import WEB
from tests.unit.test_cli_pool import Controller, serving
from tests.unit.test_cli_run import at_terminal, ended, start_emp, wait_for


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    with serving(tmp_path, monkeypatch) as pool:
        yield pool


def read_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout is not None
    seen = ""
    while words not in seen:
        piece = process.stdout.read(1)
        assert piece, f"ended without {words!r} after {seen!r}"
        seen += piece
    return seen


def test_between_pipes_input_is_sent_and_output_printed(pool: Controller) -> None:
    pool.print(b"login: ")
    process = start_emp("evm", "console", "web")
    read_until(process, "login: ")
    assert process.stdin is not None
    process.stdin.write("root\n")
    process.stdin.flush()
    wait_for(lambda: pool.typed == b"root\n", "the input at the guest")
    process.stdin.write("poweroff\n")
    process.stdin.close()  # the end of input is not the end of the output
    process.stdin = None
    wait_for(lambda: pool.typed == b"root\npoweroff\n", "the rest of the input")
    pool.print(b"# bye\r\n")
    read_until(process, "# bye")
    pool.stop_evm()
    code, out, err = ended(process)
    assert (code, out.strip()) == (0, "")
    assert err == "[EVM web is stopped: it has no console]\n"


def test_it_detaches_after_a_time(pool: Controller) -> None:
    pool.print(b"\xe2\x82\xac5\r\n")
    began_s = time.monotonic()
    process = start_emp("evm", "console", "web", "--for", "1.2s", stdin=subprocess.DEVNULL)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "€5\n", "")
    assert time.monotonic() - began_s > 1.2


def test_as_json_output_is_lines_of_text(pool: Controller) -> None:
    pool.print(b"a\r\nb")
    process = start_emp("evm", "console", "web", "--for", "1s", "--json", stdin=subprocess.DEVNULL)
    out, _ = process.communicate(timeout=20)
    assert "".join(json.loads(line)["output"] for line in out.splitlines()) == "a\r\nb"


def test_it_comes_back_after_a_restart_of_the_controller(pool: Controller) -> None:
    pool.print(b"one ")
    process = start_emp("evm", "console", "web", stdin=subprocess.DEVNULL)
    read_until(process, "one ")
    pool.cut()
    pool.print(b"two ")
    read_until(process, "one two ")
    pool.stop_evm()
    code, _, err = ended(process)
    assert code == 0
    assert "trying again" in err and "attached again" in err


def test_an_evm_that_is_stopped_has_none(pool: Controller) -> None:
    pool.evms["web"] = WEB.model_copy(update={"state": EvmState.STOPPED})
    process = start_emp("evm", "console", "web", stdin=subprocess.DEVNULL)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 4 and err.startswith("error: EVM web is stopped")


def test_at_a_terminal_every_key_goes_to_the_guest_but_one(pool: Controller) -> None:
    with at_terminal("evm", "console", "web") as terminal:
        terminal.wait_for("attached to web; Ctrl-] detaches")
        pool.print(b"\x1b[31mred\x1b[0m prompt# ")
        terminal.wait_for("prompt#")
        terminal.type(b"\x03\x1aq")
        wait_for(lambda: pool.typed == b"\x03\x1aq", "Ctrl-C and Ctrl-Z at the guest")
        terminal.type(b"x\x1dy")
        assert terminal.end() == 0
    assert pool.typed == b"\x03\x1aqx"
    assert "detached from web" in terminal.text
    assert b"\x1b[31mred" in terminal.raw, "what the guest draws is passed on as it is"


def test_a_terminal_is_left_as_it_was_when_it_is_told_to_end(pool: Controller) -> None:
    with at_terminal("evm", "console", "web") as terminal:
        terminal.wait_for("attached to web")
        assert terminal.modes() != terminal.modes_before
        terminal.send_signal(signal.SIGTERM)
        assert terminal.end() == 143
        assert terminal.modes() == terminal.modes_before
