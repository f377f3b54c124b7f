"""The set-up on machines that are not this one: fake tools on PATH note what would have been done to them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import steps
from emp_setup import apt, packages, qemu, sources
from emp_setup.console import Refusal
from emp_setup.privilege import as_root

from emp.model.errors import MissingDependency

REPOSITORY = Path(__file__).resolve().parents[2]
EVERYTHING_BUT_QEMU = "iproute2 nftables util-linux mount gcc libc6-dev ca-certificates"

DEB822 = """\
# a comment
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates trixie
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://disabled.example/debian
Suites: bookworm-backports
Components: main
"""
THIRD_PARTY = "deb [arch=amd64 signed-by=/etc/apt/keyrings/x.gpg] https://third.example/linux/debian bookworm stable\n"


class Fake:
    """A machine under ``root``: its /etc/apt, its os-release, and on PATH nothing but what is put there."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin, self.lists, self.log = root / "bin", root / "apt" / "sources.list.d", root / "log"
        self.installed, self.os_release = root / "installed", root / "os-release"
        self.bin.mkdir()
        self.lists.mkdir(parents=True)
        self.os_release.write_text('ID=debian\nVERSION_CODENAME="bookworm"\nPRETTY_NAME="Debian 12"\n')
        self.has(EVERYTHING_BUT_QEMU)
        monkeypatch.setenv("PATH", str(self.bin))
        monkeypatch.setattr(sources, "ETC_APT", root / "apt")
        monkeypatch.setattr(apt, "OS_RELEASE", self.os_release)
        for real in ("sh", "env", "install", "cat", "grep", "ls", "true"):
            (self.bin / real).symlink_to(f"/bin/{real}")
        self.tool("dpkg-query", f'shift 3; for name; do grep "^$name " {self.installed}; done')
        self.offers(own="1:7.2+dfsg-7", backports="1:10.0.2+ds-2~bpo12+1")
        shown = f"for a; do case $a in *sourceparts=*) ls ${{a#*=}} >> {self.log};; esac; done"
        self.tool("apt-get", f'echo "apt-get $*" >> {self.log}; {shown}')

    def tool(self, name: str, script: str) -> Path:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def has(self, names: str, version: str = "1") -> None:
        rows = [f"{name} {version} installed\n" for name in names.split()]
        self.installed.write_text((self.installed.read_text() if self.installed.exists() else "") + "".join(rows))

    def has_qemu(self, version: str) -> Path:
        return self.tool("qemu-system-x86_64", f"echo 'QEMU emulator version {version} (Debian 1:{version})'")

    def offers(self, own: str, backports: str) -> None:
        choose = f"v='{own}'; case \"$*\" in *Default-Release=*-backports*) v='{backports}';; esac"
        self.tool("apt-cache", f'{choose}; echo "  Candidate: $v"')

    def installing_brings_qemu(self, version: str) -> None:
        with (self.bin / "apt-get").open("a") as script:
            script.write(f"""case "$*" in *install*qemu-system-x86*)
                echo "#!/bin/sh\necho 'QEMU emulator version {version}'" > {self.bin}/qemu-system-x86_64
                /bin/chmod 755 {self.bin}/qemu-system-x86_64;; esac\n""")

    def done(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake(tmp_path, monkeypatch)
    (fake.lists / "debian.sources").write_text(DEB822)
    (fake.lists / "third.list").write_text(THIRD_PARTY)
    return fake


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="as a user, every command of these would go through sudo")


def ensure(**environ: str) -> None:
    packages.ensure(extra=[], environ=environ)


# ---- packages and QEMU ---------------------------------------------------------------------------------------------


def test_nothing_is_done_where_everything_is_there(machine: Fake) -> None:
    machine.has_qemu("10.0.2")
    machine.tool("qemu-img", "")
    ensure()
    assert machine.done() == ""


@needs_root
def test_missing_packages_are_installed_and_named(machine: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    machine.has_qemu("10.0.2")
    machine.tool("qemu-img", "")
    machine.installed.write_text(machine.installed.read_text().replace("gcc 1 ", "gcc 1 not-"))
    ensure()
    assert re.search(r"apt-get .*--no-install-recommends .*install gcc\n", machine.done())
    assert capsys.readouterr().out == "setup: installing gcc: compile the guest service\n"


@needs_root
def test_qemu_comes_from_backports_derived_from_the_machines_own_sources(
    machine: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.installing_brings_qemu("10.0.2")
    ensure()
    written = (machine.lists / sources.OURS).read_text()
    assert [line for line in written.splitlines() if not line.startswith("#")] == [
        "Types: deb",
        "URIs: http://mirror.example/debian",
        "Suites: bookworm-backports",
        "Components: main",
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg",
    ]
    assert re.search(r"apt-get .* -t bookworm-backports .*install qemu-system-x86 qemu-utils\n", machine.done())
    said = capsys.readouterr().out
    assert f"adding the suite bookworm-backports in {machine.lists / sources.OURS}" in said
    assert "installing qemu-system-x86 qemu-utils 1:10.0.2+ds-2~bpo12+1 from bookworm-backports" in said


@needs_root
def test_a_third_partys_list_is_not_asked(machine: Fake) -> None:
    machine.installing_brings_qemu("10.0.2")
    ensure()
    assert "debian.sources" in machine.done()
    assert "third.list" not in machine.done()


@needs_root
def test_backports_that_are_configured_already_are_used_as_they_are(machine: Fake) -> None:
    machine.installing_brings_qemu("10.0.2")
    (machine.lists / "mine.list").write_text("deb http://mirror.example/debian bookworm-backports main\n")
    ensure()
    assert not (machine.lists / sources.OURS).exists()
    assert "-t bookworm-backports" in machine.done()


@needs_root
def test_a_release_with_a_new_enough_qemu_needs_no_backports(machine: Fake) -> None:
    machine.os_release.write_text("ID=debian\nVERSION_CODENAME=trixie\n")
    machine.offers(own="1:10.0.2+ds-2", backports="1:10.0.3")
    machine.installing_brings_qemu("10.0.2")
    ensure()
    assert "install qemu-system-x86 qemu-utils" in machine.done()
    assert " -t " not in machine.done()
    assert not (machine.lists / sources.OURS).exists()


@needs_root
@pytest.mark.parametrize(
    ("release", "why"),
    [
        ("ID=ubuntu\nVERSION_CODENAME=noble\nPRETTY_NAME='Ubuntu 24.04'\n", "Ubuntu 24.04 offers QEMU 1:7.2"),
        ("ID=debian\nVERSION_CODENAME=bookworm\n", "bookworm-backports has 1:9.2"),
        ("ID=debian\nVERSION_CODENAME=buster\n", "no apt source of this machine carries buster main"),
    ],
)
def test_where_no_qemu_is_to_be_had_the_refusal_says_what_to_do(machine: Fake, release: str, why: str) -> None:
    machine.os_release.write_text(release)
    machine.offers(own="1:7.2", backports="1:9.2")
    with pytest.raises(Refusal, match=why) as refusal:
        ensure()
    assert "EMP_QEMU=/path/to/qemu-system-x86_64" in str(refusal.value)
    assert "install qemu" not in machine.done()


def test_an_older_qemu_is_left_alone_until_its_upgrade_is_allowed(machine: Fake) -> None:
    path = machine.has_qemu("7.2.22")
    with pytest.raises(Refusal) as refusal:
        ensure()
    assert f"{path} is QEMU 7.2, and EMP needs 10.0 or newer. It was left alone." in str(refusal.value)
    assert "EMP_UPGRADE_QEMU=1" in str(refusal.value)
    assert "EMP_QEMU=" in str(refusal.value)
    assert machine.done() == ""


def test_pieces_of_an_older_qemu_are_left_alone_too(machine: Fake) -> None:
    machine.has("qemu-utils", "1:7.2+dfsg-7")
    with pytest.raises(Refusal, match=r"installed in part \(qemu-utils\), and was left alone.*EMP_UPGRADE_QEMU=1"):
        ensure()
    assert machine.done() == ""


@needs_root
def test_an_older_qemu_is_upgraded_when_that_is_allowed(machine: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    path = machine.has_qemu("7.2.22")
    machine.has("qemu-system-x86 qemu-utils", "1:7.2+dfsg-7")
    machine.installing_brings_qemu("10.0.2")
    ensure(EMP_UPGRADE_QEMU="1")
    assert "install qemu-system-x86 qemu-utils" in machine.done()
    assert f"this replaces {path}, as EMP_UPGRADE_QEMU allows" in capsys.readouterr().out


@needs_root
def test_an_upgrade_that_did_not_help_is_refused(machine: Fake) -> None:
    path = machine.has_qemu("8.0.0")  # not from a package: apt's does not take its place
    with pytest.raises(Refusal, match=f"{path} is QEMU 8.0"):
        ensure(EMP_UPGRADE_QEMU="1")


def test_the_qemu_that_is_named_is_used_whatever_is_on_path(machine: Fake) -> None:
    machine.has_qemu("7.2.22")
    machine.tool("qemu-img", "")
    mine = machine.tool("my-qemu", "echo 'QEMU emulator version 11.1.0'")
    ensure(EMP_QEMU=str(mine))
    assert machine.done() == ""


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (None, "is no program"),
        ("echo 'QEMU emulator version 9.2.4'", "is QEMU 9.2, and EMP needs 10.0 or newer"),
        ("echo hello", "does not answer --version"),
    ],
)
def test_a_named_qemu_that_will_not_do_is_refused(machine: Fake, script: str | None, why: str) -> None:
    named = machine.bin / "my-qemu" if script is None else machine.tool("my-qemu", script)
    with pytest.raises(Refusal, match=f"{named}.* {why}"):
        ensure(EMP_QEMU=str(named))


def test_without_apt_the_refusal_names_debian(machine: Fake) -> None:
    machine.has_qemu("10.0.2")
    (machine.bin / "dpkg-query").unlink()
    with pytest.raises(Refusal, match="there is no apt here: use Debian 12 or newer"):
        ensure()


@needs_root
def test_lists_that_cannot_be_fetched_do_not_end_the_setup(machine: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    machine.has_qemu("10.0.2")
    machine.tool("apt-get", f'echo "$*" >> {machine.log}; case "$*" in *update) echo E: unreachable; exit 100;; esac')
    ensure()
    assert "install qemu-utils" in machine.done()
    assert "E: unreachable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "upstream"),
    [("1:10.0.2+ds-2+deb13u1~bpo12+1", (10, 0)), ("7.2", (7, 2)), ("(none)", (0, 0)), ("2:11.10~rc1", (11, 10))],
)
def test_upstream_version_of_a_package(version: str, upstream: tuple[int, int]) -> None:
    assert qemu.upstream(version) == upstream


# ---- apt sources ---------------------------------------------------------------------------------------------------


def test_both_formats_are_read_and_disabled_sources_are_not(machine: Fake) -> None:
    (machine.lists / "old.list.bak").write_text(THIRD_PARTY)
    (machine.lists.parent / "sources.list").write_text(
        "# deb http://off.example x y\ndeb http://on.example/ sid main # x\n"
    )
    read = sources.read_sources()
    assert [(source.uris, source.suites, source.components) for source in read] == [
        (("http://on.example/",), ("sid",), ("main",)),
        (("http://mirror.example/debian",), ("bookworm", "bookworm-updates", "trixie"), ("main", "contrib")),
        (("http://mirror.example/debian-security",), ("bookworm-security",), ("main",)),
        (("https://third.example/linux/debian",), ("bookworm",), ("stable",)),
    ]
    assert read[-1].options == {"Architectures": "amd64", "Signed-By": "/etc/apt/keyrings/x.gpg"}


def test_the_archive_itself_is_preferred_to_a_third_party_that_uses_its_suites_name(machine: Fake) -> None:
    (machine.lists / "a.list").write_text("deb http://third.example/apt bookworm main\n")
    assert "URIs: http://mirror.example/debian\n" in sources.derive_backports(sources.read_sources(), "bookworm")


def test_options_and_an_embedded_key_are_carried_over(machine: Fake) -> None:
    key = "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBF\n -----END PGP PUBLIC KEY BLOCK-----"
    text = f"Types: deb\nURIs: http://s.example/debian\nSuites: bookworm\nComponents: main\nCheck-Valid-Until: no\nSigned-By:{key}\n"  # noqa: E501
    (machine.lists / "debian.sources").write_text(text)
    derived = sources.derive_backports(sources.read_sources(), "bookworm")
    assert "Check-Valid-Until: no\n" in derived
    assert derived.endswith(f"Signed-By: {key}\n")
    (machine.lists / sources.OURS).write_text(derived)
    found = sources.backports(sources.read_sources(), "bookworm")
    assert found is not None
    assert found.uris == ("http://s.example/debian",)


# ---- becoming root -------------------------------------------------------------------------------------------------


def test_root_runs_the_command_as_it_is() -> None:
    assert as_root(["id"], "why", euid=lambda: 0, which=lambda name: None, environ={}) == ["id"]


def test_a_user_goes_through_sudo_and_takes_along_what_concerns_emp() -> None:
    environ = {"EMP_QEMU": "/q", "EMP_CACHE": "/c", "NO_COLOR": "1", "SECRET": "x"}
    command = as_root(["id", "-u"], "why", euid=lambda: 1000, which=lambda name: "/usr/bin/sudo", environ=environ)
    assert command == ["sudo", "--", "env", "EMP_CACHE=/c", "EMP_QEMU=/q", "NO_COLOR=1", "id", "-u"]


def test_root_finds_the_guest_image_that_the_user_built() -> None:
    command = as_root(["id"], "why", euid=lambda: 1000, which=lambda name: "/usr/bin/sudo", environ={})
    assert command == ["sudo", "--", "env", f"EMP_CACHE={Path.home()}/.cache/emp", "id"]


def as_user(path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run ``command`` with user id 1000 in a user namespace and only ``path`` on PATH."""
    unshare = ["/usr/bin/unshare", "--user", "--map-user=1000", "--map-group=1000"]
    return subprocess.run(
        [*unshare, *command], capture_output=True, text=True, check=False, env={**os.environ, "PATH": str(path)}
    )


@needs_root
def test_neither_root_nor_sudo_is_a_clear_error(tmp_path: Path) -> None:
    script = str(REPOSITORY / "scripts" / "as_root.py")
    done = as_user(tmp_path, sys.executable, "-B", script, "the lab makes taps", "id")
    assert done.returncode == 1
    assert done.stderr == (
        "setup: root is needed: the lab makes taps. You are not root and there is no sudo here: "
        "run the same command as root, or have sudo installed\n"
    )


@needs_root
def test_sudo_is_used_and_the_reason_said(tmp_path: Path) -> None:
    sudo = tmp_path / "sudo"
    sudo.write_text('#!/bin/sh\necho "sudo $*"\n')
    sudo.chmod(0o755)
    script = str(REPOSITORY / "scripts" / "as_root.py")
    done = as_user(tmp_path, sys.executable, "-B", script, "the lab makes taps", "emp", "lab", "demo")
    assert done.stdout.startswith("setup: using sudo: the lab makes taps\nsudo -- env ")
    assert done.stdout.endswith(" emp lab demo\n")


# ---- the whole -----------------------------------------------------------------------------------------------------


def test_a_setup_with_everything_in_place_is_silent_and_quick() -> None:
    """Promise: under 2 s. The first run is not counted: `make` has done it before the tests, an editor may not have."""
    command = [str(REPOSITORY / "scripts" / "setup"), "--dev"]
    subprocess.run(command, check=True, capture_output=True)
    took_s = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        took_s.append(time.monotonic() - started)
        assert done.stdout + done.stderr == ""
    assert min(took_s) < 2


def test_a_python_that_is_too_old_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    environ = {**os.environ, "PYTHON": str(old)}
    done = subprocess.run([REPOSITORY / "scripts" / "setup"], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"PYTHON={old} is not a Python 3.11 or newer" in done.stderr


def test_the_exit_status_for_what_is_missing_is_emps_own() -> None:
    assert MissingDependency.exit_code == steps.MISSING_DEPENDENCY


def test_every_requirement_is_pinned_by_hash_and_named_alone() -> None:
    pins = {name: pinned(REPOSITORY / name) for name in ("requirements.txt", "requirements-dev.txt")}
    assert pins["requirements.txt"].items() <= pins["requirements-dev.txt"].items()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    for wanted in project["project"]["dependencies"] + groups["build"]:
        assert canonical(wanted) in pins["requirements.txt"]
    for wanted in groups["dev"]:
        assert canonical(wanted) in pins["requirements-dev.txt"]


def pinned(file: Path) -> dict[str, str]:
    """Return name -> version, having checked that each has hashes and that nothing else is in the file."""
    pins: dict[str, str] = {}
    for block in re.split(r"\n(?=\S)", re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.MULTILINE).strip()):
        match = re.fullmatch(r"(\S+)==(\S+)( ; [^\\\n]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+", block)
        assert match, block
        pins[match[1]] = match[2]
    return pins


def canonical(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def test_make_alone_lists_what_can_be_made() -> None:
    done = subprocess.run(
        ["make", "-C", REPOSITORY, "--no-print-directory"], capture_output=True, text=True, check=True
    )
    listed = re.findall(r"^  make ([a-z-]+)  +\S", done.stdout, re.MULTILINE)
    assert {"setup", "demo", "test", "lint", "bench-idle", "clean"} <= set(listed)
