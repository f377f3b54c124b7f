"""The recipe of the image `debian`: when it is built anew, and what it says where it cannot be."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from emp.lab import debian, pods
from emp.lab.images import GUEST_SOURCES
from emp.model.errors import MissingDependency

MANIFEST = debian.SOURCES / "root/etc/kubernetes/manifests/web.yaml"


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A busybox and a kernel, and a copy of the guest's files to be changed."""
    busybox, kernel, sources = tmp_path / "busybox", tmp_path / "6.1", tmp_path / "debian"
    busybox.write_bytes(b"busybox")
    (kernel / "modules").mkdir(parents=True)
    (kernel / "kernel").write_bytes(b"kernel")
    (sources / "root").mkdir(parents=True)
    (sources / "root" / "unit").write_text("one")
    monkeypatch.setattr(debian, "SOURCES", sources)
    return busybox, kernel


def test_the_same_recipe_is_found_again(parts: tuple[Path, Path]) -> None:
    assert debian.recipe(*parts) == debian.recipe(*parts)


def test_whatever_goes_into_it_makes_another(parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [debian.recipe(*parts)]
    (debian.SOURCES / "root" / "unit").write_text("two")
    seen.append(debian.recipe(*parts))
    (debian.SOURCES / "root" / "unit").rename(debian.SOURCES / "root" / "moved")
    seen.append(debian.recipe(*parts))
    parts[0].write_bytes(b"another busybox")
    seen.append(debian.recipe(*parts))
    monkeypatch.setattr(debian, "PACKAGES", (*debian.PACKAGES, "vim"))
    seen.append(debian.recipe(*parts))
    monkeypatch.setattr(debian, "_codename", lambda: "trixie")
    seen.append(debian.recipe(*parts))
    assert len(set(seen)) == len(seen)


def test_it_is_not_built_by_a_user(parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "ensure_busybox", lambda cache, notice: parts[0])
    monkeypatch.setattr(debian, "ensure_kernel", lambda cache, notice: parts[1])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MissingDependency, match="root is needed"):
        debian.ensure_debian(tmp_path / "cache")


def test_apt_names_the_files_of_the_release_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told = (
        "bookworm main\t/etc/apt/sources.list.d/debian.sources:1\n"
        "bookworm-security main\t/etc/apt/sources.list.d/debian.sources:2\n"
        "bookworm-backports main\t/etc/apt/sources.list.d/backports.sources:1\n"
        "bookworm stable\t/etc/apt/sources.list.d/third-party.list:1\n"
    )
    monkeypatch.setattr(debian, "_codename", lambda: "bookworm")
    monkeypatch.setattr(debian, "run_tool", lambda argv, need: told)
    assert debian._apt_sources() == ["/etc/apt/sources.list.d/debian.sources"]
    monkeypatch.setattr(debian, "run_tool", lambda argv, need: "")
    with pytest.raises(MissingDependency, match="no package list of bookworm main"):
        debian._apt_sources()


def test_the_manifest_has_two_pods_that_ask_for_nothing_from_outside() -> None:
    text = MANIFEST.read_text()
    assert re.findall(r"^  name: (\S+)$", text, re.MULTILINE) == ["web-0", "web-1"]
    assert set(re.findall(r"image: (\S+)$", text, re.MULTILINE)) == {"localhost/emp-pod:latest"}
    assert text.count("imagePullPolicy: Never") == text.count("image: ")


def test_podman_answers_at_a_port_that_the_guest_service_does_not_have() -> None:
    """Whoever comes second does not listen: a question to podman was once answered with bulk data that had no end."""
    taken = {int(port) for port in re.findall(r"_PORT = (\d+)", (GUEST_SOURCES / "service.c").read_text())}
    socket = (debian.SOURCES / "root/etc/systemd/system/emp-podman.socket").read_text()
    assert len(taken) == 4
    assert re.findall(r"^ListenStream=(.*)$", socket, re.MULTILINE) == [str(pods.PORT)]
    assert pods.PORT not in taken
