"""Every error is one block on stderr (or one line of JSON) and an exit code; none is a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from emp.controller.addresses import parse_pods
from emp.model import errors
from emp.model.errors import EmpError
from emp.wire.secret import Secret
from tests.unit.test_cli_pool import Controller, serving
from tests.unit.test_cli_run import POOL, Emp, in_process

EXIT_CODES = {
    "EmpError": 1, "BadInput": 2, "NotFound": 3, "Conflict": 4, "AlreadyExists": 4, "StaleEpoch": 4, "Refused": 5,
    "NoPlacement": 5, "Unauthenticated": 6, "Forbidden": 6, "Unavailable": 7, "NodeDown": 7, "Unreachable": 7,
    "StoreUnavailable": 7, "OutcomeUnknown": 8, "MigrationAborted": 9, "HostError": 10, "CommandFailed": 10,
    "HypervisorError": 10, "FenceFailed": 10, "MissingDependency": 10, "Internal": 1,
}  # fmt: skip


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    with serving(tmp_path, monkeypatch) as pool:
        yield pool


@pytest.fixture
def emp(capsys: pytest.CaptureFixture[str]) -> Emp:
    return in_process(capsys)


@pytest.mark.parametrize(("name", "exit_code"), EXIT_CODES.items())
def test_each_error_of_the_controller_has_its_exit_code(pool: Controller, emp: Emp, name: str, exit_code: int) -> None:
    kind: type[EmpError] = getattr(errors, name)
    pool.refusal = kind("it cannot be done", field="memory_bytes", hint="do another thing", node="n7")
    code, out, err = emp("evm create web")
    assert (code, out) == (exit_code, "")
    assert err == "error: it cannot be done\nfield: memory_bytes\nhint:  do another thing\n"
    code, out, err = emp("evm create web --json")
    assert (code, out) == (exit_code, "")
    assert json.loads(err) == pool.refusal.as_dict()


def test_every_error_is_in_the_table_and_in_the_documentation() -> None:
    tree = [cls for cls in errors._tree(EmpError).values() if cls.__module__ == errors.__name__]
    assert set(EXIT_CODES) == {cls.__name__ for cls in tree}
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for cls in tree:
        assert f"| {cls.exit_code} |" in page and f"`{cls.code}`" in page


def test_a_message_of_several_lines_stays_one_block(pool: Controller, emp: Emp) -> None:
    pool.refusal = errors.HostError("qemu ended:\nline one\nline two")
    assert emp("evm start web")[2] == "error: qemu ended:\n       line one\n       line two\n"


def test_several_problems_are_all_told(pool: Controller, emp: Emp) -> None:
    problems = [{"field": "a", "reason": "too big"}, {"field": "b", "reason": "too small"}]
    pool.refusal = errors.BadInput("too big", field="a", problems=problems)
    assert emp("evm create web")[2] == "error: too big\nfield: a\nalso:  b: too small\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("evm show ../x", ["'../x' is not a valid name", "field: evm", "1 to 63 characters"]),
        (f"evm show {'x' * 300}", ["is not a valid name", "field: evm"]),
        ("evm show a,b=c", ["'a,b=c' is not a valid name"]),
        ("migrate -- -x", ["'-x' is not a valid name", "field: evm"]),
        ("node cordon N1", ["'N1' is not a valid name", "field: node"]),
        ("migration show ../m", ["field: "]),
        ("volume show a/b", ["field: volume"]),
        ("volume create 1GiB", ["'1GiB' is not a type and a size", "like io2:1GiB"]),
        ("volume create shared", ["named by its URL", "field: url", "--url nbds://"]),
        ("volume create shared --url rbd:p/i --size 12Q", ["'12Q' is not a size", "field: size"]),
        ("volume create io2:1GiB --url rbd:p/i", ["only shared storage takes it", "field: url"]),
        ("volume create io2:1GiB --size 1GiB", ["only shared storage takes it", "field: size"]),
        ("volume create io2:12Q", ["'12Q' is not a size", "field: size", "512MiB"]),
        ("evm create web --memory 12Q", ["'12Q' is not a size", "field: memory", "512MiB"]),
        ("migrate web --deadline soon", ["'soon' is not a duration", "field: deadline", "90s"]),
        ("migrate web --max-bandwidth 12Q", ["'12Q' is not a size", "field: max-bandwidth"]),
        ("migrate web --max-blackout -5", ["is not a duration"]),
        ("evm console web --for ever", ["'ever' is not a duration", "field: for"]),
        ("evm create web --vcpus many", ["'--vcpus'", "field: --vcpus", "emp evm create --help"]),
        ("evm create", ["Missing argument 'NAME'"]),
        ("evm frobnicate", ["No such command 'frobnicate'"]),
        ("migrat web", ["Did you mean 'migrate'"]),
        ("evm list --loud", ["No such option: --loud"]),
    ],
)
def test_bad_input_is_told_before_anything_is_asked(pool: Controller, emp: Emp, line: str, words: list[str]) -> None:
    code, out, err = emp(line)
    assert (code, out) == (2, "")
    assert [word for word in words if word not in err] == []
    assert err.startswith("error: ") and "Traceback" not in err
    assert pool.told == []


def test_a_wrong_command_line_is_json_too(pool: Controller, emp: Emp) -> None:
    code, _, err = emp("evm create web --vcpus many --json")
    assert code == 2 and json.loads(err)["code"] == "bad_input" and json.loads(err)["field"] == "--vcpus"


@pytest.mark.parametrize("line", ["", "evm", "migration"])
def test_nothing_said_shows_the_help(emp: Emp, line: str) -> None:
    code, out, err = emp(line)
    assert code == 2 and "Usage: emp" in out + err


def test_unknown_things_are_not_found(pool: Controller, emp: Emp) -> None:
    for line in ("evm show nope", "node show nope", "volume show nope", "migration show m-ffffffffff", "migrate nope"):
        code, _, err = emp(line)
        assert code == 3 and err.startswith("error: no "), line


def test_a_controller_that_is_not_there_is_named_with_what_to_do(pool: Controller, emp: Emp) -> None:
    pool.stop()
    code, _, err = emp("evm list")
    assert code == 7
    assert f"the controller of '{POOL}' at https://127.0.0.1:{pool.port} cannot be reached: Connection refused" in err
    assert "--context NAME" in err
    assert json.loads(emp("evm list --json")[2])["code"] == "unreachable"
    pool.start()


def test_a_wrong_token_is_told(pool: Controller, emp: Emp, tmp_path: Path) -> None:
    path = tmp_path / "contexts" / f"{POOL}.json"
    path.write_text(path.read_text().replace("sesame", Secret("mustard").reveal()))
    code, _, err = emp("evm list")
    assert code == 6 and "the bearer token is wrong" in err


def test_another_pool_at_the_address_is_told(pool: Controller, emp: Emp, tmp_path: Path) -> None:
    path = tmp_path / "contexts" / f"{POOL}.json"
    path.write_text(path.read_text().replace("controller-main", "controller-other"))
    code, _, err = emp("evm list")
    assert code == 7 and "one of another pool" in err


def test_no_context_and_an_unknown_one(emp: Emp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMP_CONTEXT_DIR", str(tmp_path))
    monkeypatch.delenv("EMP_CONTEXT", raising=False)
    code, _, err = emp("evm list")
    assert code == 2 and "no pool is known here" in err and "emp lab up" in err
    assert emp("--context nope evm list")[0] == 3
    monkeypatch.setenv("EMP_CONTEXT", "nope")
    assert "no context 'nope'" in emp("evm list")[2]


def test_help_names_every_noun_and_imports_none(emp: Emp) -> None:
    code, out, _ = emp("--help")
    assert code == 0
    for noun in ("evm", "migrate", "migration", "node", "volume", "lab", "agent", "controller"):
        assert f"│ {noun} " in out
    assert max(map(len, out.splitlines())) <= 80


def test_help_errors_and_documentation_say_the_same_of_a_pods_addresses(emp: Emp) -> None:
    form = "NAME[=ADDRESS[,ADDRESS]]"
    code, out, _ = emp("evm create --help")
    assert code == 0 and form in out and "or auto" in out
    assert f"`--pod {form}`" in (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    with pytest.raises(errors.BadInput) as caught:
        parse_pods(["a=auto,auto"])
    assert caught.value.hint == f"write {form}: one of IPv4, one of IPv6 or auto"


def test_a_shell_completes_nouns_and_verbs() -> None:
    def complete(words: str, number: int) -> list[str]:
        asked = {"_EMP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
        command = [sys.executable, "-c", "import sys; sys.argv[0] = 'emp'; from emp.cli.main import main; main()"]
        done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=False)
        return done.stdout.split()

    assert complete("emp mig", 1) == ["migrate", "migration"]
    assert "console" in complete("emp evm ", 2)


@pytest.mark.parametrize("daemon", ["agent", "controller"])
def test_daemons_are_run_in_place(daemon: str, tmp_path: Path) -> None:
    missing = tmp_path / "nothing.json"
    command = [sys.executable, "-m", "emp.cli.main", daemon, "--config", str(missing)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (2, 3) and str(missing) in done.stderr and "Traceback" not in done.stderr
