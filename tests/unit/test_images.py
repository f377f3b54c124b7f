"""The guest image's cache: what keys it, that it is whole or not there, and what is said when it cannot be built."""

from __future__ import annotations

import lzma
import stat
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from emp.lab import images
from emp.lab.images import cpio, default_cache, ensure_busybox, ensure_image, hash_inputs, module_order
from emp.model.errors import BadInput, MissingDependency


def plant_kernel(cache: Path, version: str = "6.1.1-1") -> Path:
    """Put a kernel of our own and a busybox into the cache, so that apt is not asked; no module depends on another."""
    home = images.kernels_of(cache) / version
    (home / "modules").mkdir(parents=True)
    (home / "kernel").write_bytes(b"kernel " + version.encode())
    for name in images.MODULES:
        (home / "modules" / f"{name}.ko").write_bytes(b"\x7fELF\0name=" + name.encode() + b"\0depends=\0")
    (home / "modules" / "modules.builtin").write_text("")
    busybox = cache / "busybox" / "busybox"
    if not busybox.exists():  # a host without one of its own
        busybox.parent.mkdir()
        busybox.write_text("#!/bin/sh\nprintf 'busybox\\nsh\\n'\n")
        busybox.chmod(0o755)
    return home


@pytest.fixture
def quick_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A compiler that writes the same small program for every source, counted in the file that is returned."""
    tools, runs = tmp_path / "tools", tmp_path / "runs"
    tools.mkdir()
    compiler = tools / "gcc"
    compiler.write_text(
        f'#!/bin/sh\necho run >>{runs}\nfor out; do [ "$last" = -o ] && echo guest >"$out"; last=$out; done\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return runs


def failing(tools: Path, name: str, message: str) -> None:
    tools.mkdir(exist_ok=True)
    (tools / name).write_text(f"#!/bin/sh\necho '{message}' >&2\nexit 100\n")
    (tools / name).chmod(0o755)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMP_CACHE", str(tmp_path / "elsewhere"))
    assert default_cache() == tmp_path / "elsewhere"
    monkeypatch.delenv("EMP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "emp"


def test_the_key_follows_every_input(tmp_path: Path) -> None:
    source, init = tmp_path / "service.c", tmp_path / "init"
    source.write_text("int main;")
    init.write_text("#!/bin/sh")
    keys = [hash_inputs([source, init], "6.1.1-1")]
    assert hash_inputs([source, init], "6.1.1-1") == keys[0]
    keys.append(hash_inputs([source, init], "6.1.1-2"))
    source.write_text("int Main;")
    keys.append(hash_inputs([source, init], "6.1.1-1"))
    init.write_text("#!/bin/ash")
    keys.append(hash_inputs([source, init], "6.1.1-1"))
    source.rename(tmp_path / "other.c")
    keys.append(hash_inputs([tmp_path / "other.c", init], "6.1.1-1"))
    assert len(set(keys)) == 5


def test_the_key_follows_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = hash_inputs([], "6.1.1-1")
    monkeypatch.setattr(images, "RECIPE", images.RECIPE + " ")
    assert hash_inputs([], "6.1.1-1") != before


def test_an_image_is_built_once(tmp_path: Path, quick_build: Path) -> None:
    plant_kernel(tmp_path)
    said: list[str] = []
    first = ensure_image(cache=tmp_path, notice=said.append)
    assert len(said) == 1
    assert first.kernel.read_bytes() == b"kernel 6.1.1-1"
    assert first.initrd.read_bytes().startswith(b"070701")
    assert first.kernel_version == "6.1.1-1"
    assert len(first.digest) == 64
    assert ensure_image(cache=tmp_path, notice=said.append) == first
    assert len(said) == 1
    assert quick_build.read_text().count("run") == 1


def test_an_image_that_is_there_needs_no_tool_and_no_time(
    tmp_path: Path, quick_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_kernel(tmp_path)
    image = ensure_image(cache=tmp_path)

    def forbidden(*arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"ran {arguments}")

    monkeypatch.setattr(subprocess, "run", forbidden)
    times_s = []
    for _ in range(5):
        began = time.perf_counter()
        assert ensure_image(cache=tmp_path) == image
        times_s.append(time.perf_counter() - began)
    assert min(times_s) < 0.05


def test_the_digest_follows_the_contents(tmp_path: Path, quick_build: Path) -> None:
    plant_kernel(tmp_path / "a")
    plant_kernel(tmp_path / "b")
    plant_kernel(tmp_path / "c", "6.1.2-1")
    a, b, c = (ensure_image(cache=tmp_path / name).digest for name in "abc")
    assert a == b != c


def test_a_newer_kernel_in_the_cache_makes_another_image(tmp_path: Path, quick_build: Path) -> None:
    plant_kernel(tmp_path)
    old = ensure_image(cache=tmp_path)
    plant_kernel(tmp_path, "6.1.2-1")
    new = ensure_image(cache=tmp_path)
    assert (old.kernel_version, new.kernel_version) == ("6.1.1-1", "6.1.2-1")
    assert old.kernel.exists()


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_kernel(tmp_path)
    failing(tmp_path / "tools", "gcc", "service.c: does not compile")
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:/usr/bin:/bin")
    with pytest.raises(MissingDependency, match="does not compile"):
        ensure_image(cache=tmp_path)
    assert list((tmp_path / "images").iterdir()) == []


def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_kernel(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match=r"gcc is not installed.*install gcc"):
        ensure_image(cache=tmp_path)


def test_builders_that_race_end_up_with_one_image(tmp_path: Path, quick_build: Path) -> None:
    plant_kernel(tmp_path)
    built: list[images.Image] = []
    builders = [threading.Thread(target=lambda: built.append(ensure_image(cache=tmp_path))) for _ in range(4)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(built) == 4
    assert len(set(built)) == 1
    assert [path.name for path in (tmp_path / "images").iterdir()] == [built[0].kernel.parent.name]


def test_half_an_image_is_never_seen(tmp_path: Path) -> None:
    seen: list[bool] = []
    home = tmp_path / "images" / "micro-0"

    def build(target: Path) -> None:
        (target / "kernel").write_text("half")
        seen.append(home.exists())
        (target / "image.json").write_text("{}")

    images.publish(home, build)
    assert seen == [False]
    assert {path.name for path in home.iterdir()} == {"kernel", "image.json"}


def test_a_kernel_that_cannot_be_fetched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    failing(tools, "apt-cache", "No packages found")
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    with pytest.raises(MissingDependency, match=r"linux-image-cloud-amd64.*apt-get update"):
        ensure_image(cache=tmp_path / "cache")
    (tools / "apt-cache").write_text("#!/bin/sh\necho '  Depends: linux-image-6.1.0-99-cloud-amd64'\n")
    failing(tools, "apt-get", "E: Failed to fetch: 404")
    with pytest.raises(MissingDependency, match=r"404.*linux-image-6.1.0-99-cloud-amd64.*apt-get update"):
        ensure_image(cache=tmp_path / "cache")


def test_the_command_ends_with_the_errors_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(tmp_path / "tools", "apt-cache", "No packages found")
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:/usr/bin:/bin")
    monkeypatch.setenv("EMP_CACHE", str(tmp_path / "cache"))
    assert images.main([]) == MissingDependency.exit_code
    assert "error: " in capsys.readouterr().err


def test_there_is_one_image(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="image: there is no image 'macro'"):
        ensure_image("macro", tmp_path)


def plant_modules(tree: Path, depends: dict[str, str], built_in: str = "") -> None:
    (tree / "kernel").mkdir()
    for name, needs in depends.items():
        (tree / "kernel" / f"{name}.ko").write_bytes(b"\x7fELF\0license=GPL\0depends=" + needs.encode() + b"\0")
    (tree / "modules.builtin").write_text(built_in)


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    depends = {
        "virtio": "",
        "virtio_ring": "virtio",
        "virtio-rng": "virtio_ring,virtio",
        "net_failover": "",
        "lone": "",
    }
    plant_modules(tmp_path, depends | {"virtio_net": "net_failover,virtio_ring"}, "kernel/net/packet/af_packet.ko\n")
    order = [path.stem for path in module_order(tmp_path, ["af_packet", "virtio_net", "virtio_rng"])]
    assert order == ["net_failover", "virtio", "virtio_ring", "virtio_net", "virtio-rng"]


def test_a_module_that_the_kernel_lacks_is_named(tmp_path: Path) -> None:
    plant_modules(tmp_path, {"virtio_net": "gone"})
    with pytest.raises(MissingDependency, match="no module gone"):
        module_order(tmp_path, ["virtio_net"])


def test_the_archive_is_one_that_cpio_reads(tmp_path: Path) -> None:
    entries = [
        ("bin", stat.S_IFDIR | 0o755, b""),
        ("bin/tool", stat.S_IFREG | 0o755, b"#!/bin/sh\n"),
        ("bin/alias", stat.S_IFLNK | 0o777, b"tool"),
        ("odd", stat.S_IFREG | 0o600, b"x" * 4097),
    ]
    archive = cpio(entries)
    assert archive == cpio(entries)
    busybox = ensure_busybox(default_cache())  # there since the set-up has built the image
    subprocess.run([busybox, "cpio", "-id"], cwd=tmp_path, input=archive, capture_output=True, check=True)
    assert (tmp_path / "bin" / "alias").readlink() == Path("tool")
    assert (tmp_path / "bin" / "alias").read_bytes() == b"#!/bin/sh\n"
    assert (tmp_path / "odd").read_bytes() == b"x" * 4097
    assert stat.S_IMODE((tmp_path / "odd").stat().st_mode) == 0o600


def bzimage(payload: bytes) -> bytes:
    """A kernel image with one sector of set-up code and ``payload`` at the start of its protected-mode part."""
    head = bytearray(1024)
    head[0x1F1] = 1
    struct.pack_into("<II", head, 0x248, 0, len(payload))
    return bytes(head) + payload


def test_a_kernel_packed_with_lz4_is_unpacked() -> None:
    literals = b"\x7fELF is what it begins with, and so on"
    block = bytes([0xF0, len(literals) - 15]) + literals  # one run of literals
    payload = b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block + struct.pack("<I", len(literals))
    assert images.uncompressed_kernel(bzimage(payload)) == literals


@pytest.mark.parametrize(
    "payload",
    [
        b"\x1f\x8b\x08\x00 some other packing",
        b"\x02\x21\x4c\x18" + struct.pack("<I", 4) + b"\xff\xff\xff\xff" + bytes(4),
    ],
)
def test_a_kernel_packed_otherwise_boots_as_it_is(payload: bytes) -> None:
    assert images.uncompressed_kernel(bzimage(payload)) == bzimage(payload)


@pytest.mark.parametrize(("home", "packed"), [("lib/modules", False), ("usr/lib/modules", True)])
def test_modules_are_found_as_either_debian_packs_them(tmp_path: Path, home: str, packed: bool) -> None:
    folder = tmp_path / home / "6.1.0-1-cloud-amd64" / "kernel"
    folder.mkdir(parents=True)
    content = b"\x7fELF module"
    (folder / ("a.ko.xz" if packed else "a.ko")).write_bytes(lzma.compress(content) if packed else content)
    tree = images.module_tree(tmp_path)
    assert tree.name == "6.1.0-1-cloud-amd64"
    assert (tree / "kernel" / "a.ko").read_bytes() == content
