"""Read the machine's own apt sources, to derive a backports suite from them (formats: sources.list(5)).

Both formats are read: deb822 stanzas in ``*.sources`` and one line per source in ``*.list``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from emp_setup.console import Refusal

ETC_APT = Path("/etc/apt")
OURS = "emp-backports.sources"
_NOT_CARRIED = {"types", "uris", "suites", "components", "enabled", "targets"}


@dataclass(frozen=True)
class Source:
    """One enabled ``deb`` source; ``options`` go by their deb822 names, such as ``Signed-By``."""

    path: Path
    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict)


def read_sources() -> list[Source]:
    """Return every enabled source of binary packages, in the order in which apt reads them."""
    files = [ETC_APT / "sources.list", *sorted((ETC_APT / "sources.list.d").glob("*"))]
    sources: list[Source] = []
    for path in files:
        if path.suffix == ".list" and path.is_file():
            sources += _one_line_sources(path)
        elif path.suffix == ".sources" and path.is_file():
            sources += _deb822_sources(path)
    return sources


def family(codename: str) -> set[str]:
    """Return the suites that make up a Debian release, its backports included."""
    return {codename, *(f"{codename}-{part}" for part in ("updates", "security", "proposed-updates", "backports"))}


def files_of_release(sources: Iterable[Source], codename: str) -> list[Path]:
    """Return the files that carry the release's suites: all that apt has to read here.

    A third party's list may be unreachable, and is no business of this set-up.
    """
    suites = family(codename)
    files = [source.path for source in sources if suites & set(source.suites) and "main" in source.components]
    return list(dict.fromkeys(files))


def backports(sources: Iterable[Source], codename: str) -> Source | None:
    """Return the source that carries the release's backports already, if one does."""
    suite = f"{codename}-backports"
    return next((source for source in sources if suite in source.suites and "main" in source.components), None)


def derive_backports(sources: Iterable[Source], codename: str) -> str:
    """Return the text of a deb822 file that adds the backports suite, from where the release itself comes.

    :raises Refusal: no source carries the release's main component
    """
    carriers = [source for source in sources if codename in source.suites and "main" in source.components]
    if not carriers:
        raise Refusal(
            f"no apt source of this machine carries {codename} main, so its backports suite cannot be derived: "
            f"add {codename}-backports to your apt sources, or name a QEMU with EMP_QEMU=/path/to/qemu-system-x86_64"
        )
    best = max(carriers, key=_looks_like_debian)  # the first of equals
    fields = {
        "Types": "deb",
        "URIs": " ".join(best.uris),
        "Suites": f"{codename}-backports",
        "Components": "main",
        **best.options,
    }
    lines = [
        "# Written by the set-up of EMP live migration, for a QEMU that is new enough.",
        f"# Derived from {best.path}. Remove this file and run apt-get update to undo.",
        *(f"{name}: {value}" for name, value in fields.items()),
    ]
    return "\n".join(lines) + "\n"


def _looks_like_debian(source: Source) -> int:
    """Third parties may call a suite by the release's name too: rank the archive itself above them."""
    signed_by_debian = "debian-archive" in source.options.get("Signed-By", "")
    in_debians_place = any(uri.rstrip("/").endswith("/debian") for uri in source.uris)
    return 2 * signed_by_debian + in_debians_place


def _one_line_sources(path: Path) -> Iterator[Source]:
    for line in path.read_text(errors="replace").splitlines():
        entry = re.match(r"\s*deb\s+(?:\[(?P<options>[^\]]*)\]\s*)?(?P<rest>[^#]*)", line)
        words = entry["rest"].split() if entry else []
        if not entry or len(words) < 2:
            continue
        pairs = (pair.partition("=") for pair in (entry["options"] or "").split())
        options = {_deb822_name(name): value.replace(",", " ") for name, _, value in pairs}
        yield Source(path, (words[0],), (words[1],), tuple(words[2:]), options)


def _deb822_name(option: str) -> str:
    """Return the deb822 name of a one-line option: ``signed-by`` is ``Signed-By``, ``arch`` is ``Architectures``."""
    names = {"arch": "Architectures", "lang": "Languages", "target": "Targets"}
    return names.get(option.lower(), "-".join(part.capitalize() for part in option.split("-")))


def _deb822_sources(path: Path) -> Iterator[Source]:
    for stanza in re.split(r"\n\s*\n", path.read_text(errors="replace")):
        fields = _fields(stanza)
        lowered = {name.lower(): value for name, value in fields.items()}
        if "deb" not in lowered.get("types", "").split() or lowered.get("enabled", "yes").lower() in ("no", "false"):
            continue
        yield Source(
            path,
            tuple(lowered.get("uris", "").split()),
            tuple(lowered.get("suites", "").split()),
            tuple(lowered.get("components", "").split()),
            {name: value for name, value in fields.items() if name.lower() not in _NOT_CARRIED},
        )


def _fields(stanza: str) -> dict[str, str]:
    """Return a stanza's fields; a value of several lines (an embedded key) keeps its line breaks and indents."""
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line.startswith("#"):
            continue
        if line[:1].isspace() and name:
            fields[name] += "\n" + line
        elif ":" in line:
            name, _, value = line.partition(":")
            name = name.strip()
            fields[name] = value.strip()
    return fields
