"""Rules for every file of the repository that no linter has. Each rule is shown to bite, on a planted breach."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LONGEST_LINES = 600
GENERATED = {"requirements.txt", "requirements-dev.txt", "LICENSE"}

Rule = Callable[[Path, str], Iterator[str]]


def files() -> list[Path]:
    """Return all files that are, or would be, in the repository."""
    git = ["git", "-c", "safe.directory=*", "-C", str(REPOSITORY)]
    listed = subprocess.run([*git, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True)
    return [path for name in listed.stdout.splitlines() if (path := REPOSITORY / name).is_file()]


def too_long(path: Path, text: str) -> Iterator[str]:
    """A file that is read in one go has a page or two; past 600 lines it is several things."""
    count = len(text.splitlines())
    if count > LONGEST_LINES and path.name not in GENERATED:
        yield f"{count} lines, {LONGEST_LINES} at most"


def swallowed_errors(path: Path, text: str) -> Iterator[str]:
    """An error that is dropped is named in `contextlib.suppress`, or a comment says who deals with it."""
    lines = text.splitlines()
    for node in ast.walk(_tree(path, text)):
        if not (isinstance(node, ast.ExceptHandler) and all(_says_nothing(statement) for statement in node.body)):
            continue
        is_named = node.type is not None and ast.unparse(node.type) not in ("Exception", "BaseException")
        if not (is_named and any("#" in line for line in lines[node.lineno - 1 : node.end_lineno])):
            yield f"line {node.lineno}: an empty except"


def unexplained_sleeps(path: Path, text: str) -> Iterator[str]:
    """A sleep of a fixed time hides a race, unless a comment beside it says what cannot be awaited.

    Inside a loop it is the step of a poll, and the loop says what is waited for.
    """
    lines = text.splitlines()
    for node, is_looped in _with_loops(_tree(path, text)):
        if is_looped or not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        is_fixed = node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value
        is_explained = any("#" in line for line in lines[max(0, node.lineno - 2) : node.lineno])
        if node.func.attr == "sleep" and is_fixed and not is_explained:
            yield f"line {node.lineno}: a sleep without a reason"


def _with_loops(node: ast.AST, is_looped: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every node below with whether it stands in a loop of the function that it is in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            below = False
        else:
            below = is_looped or isinstance(child, ast.While | ast.For | ast.AsyncFor)
        yield child, below
        yield from _with_loops(child, below)


def undescribed_modules(path: Path, text: str) -> Iterator[str]:
    """The first thing a reader learns of a module is why it exists."""
    if not ast.get_docstring(_tree(path, text)):
        yield "no docstring"


def places_of_one_machine(path: Path, text: str) -> Iterator[str]:
    """The tree is cloned anywhere, and packages come from wherever the machine is set up to get them."""
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(r"(^|[^\w.$}-])/(work|farm|root|home)/[a-z]|bash[_]jobs", line):
            yield f"line {number}: a path of one machine"
        if re.search(r"pythonhosted[.]org|pypi[.]org|npmjs[.](org|com)|(deb|snapshot)[.]debian[.]org", line):
            yield f"line {number}: the host of a package index"


def _tree(path: Path, text: str) -> ast.Module:
    return ast.parse(text if path.suffix == ".py" else "", filename=str(path))


def _says_nothing(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


RULES: dict[Rule, str] = {
    too_long: "x = 1\n" * (LONGEST_LINES + 1),
    swallowed_errors: "try:\n    f()\nexcept ValueError:\n    ...\n",
    unexplained_sleeps: "import time\n\ntime.sleep(0.5)\n",
    undescribed_modules: "x = 1\n",
    places_of_one_machine: "HERE = '/" + "home/someone'\n",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_in_every_file(rule: Rule) -> None:
    breaches = []
    for path in files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture
        if rule is undescribed_modules and path.suffix != ".py":
            continue
        breaches += [f"{path.relative_to(REPOSITORY)}: {breach}" for breach in rule(path, text)]
    assert not breaches, "\n".join([str(rule.__doc__), *breaches])


@pytest.mark.parametrize(("rule", "breach"), RULES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_rule_bites(rule: Rule, breach: str) -> None:
    assert list(rule(Path("planted.py"), breach))


def test_an_index_host_is_seen() -> None:
    assert list(places_of_one_machine(Path("planted.txt"), "from https://pypi" + ".org/simple"))


def test_scripts_can_be_run() -> None:
    for name in (".ci/run", "scripts/setup"):
        assert (REPOSITORY / name).stat().st_mode & 0o111, name
