"""Builds and caches the `micro` guest image: Debian's cloud kernel and an initramfs of busybox and the guest service.

Nothing is installed on the host: kernel and (where the host has none) busybox are fetched with ``apt-get download``
and unpacked aside. The image is kept in a cache directory named by the hash of what it was made from, so an image that
is there is found without compiler or apt. ``python -m emp.lab.images`` builds it by hand, ``--refresh`` looks for a
newer kernel first.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from emp.model.errors import BadInput, MissingDependency

RECIPE_VERSION = 1
"""Counts changes of this module that change the image and are not in the guest's own sources."""

KERNEL_FORMAT = 1
"""Counts changes of how a kernel package is unpacked into the cache."""

KERNEL_COMMAND_LINE = (
    "console=ttyS0 quiet panic=0 reboot=t no_timer_check tsc=reliable "
    # Each of these saves 0.1 to 0.5 s of a boot under emulation.
    "mitigations=off nokaslr noreplace-smp cryptomgr.notests lsm= audit=0"
)
"""Base of the kernel command line. What an EVM is comes from the fw_cfg file ``opt/emp/config`` instead."""

FW_CFG_NAME = "opt/emp/config"
"""Name of the fw_cfg file that ``guest/init`` reads; its format is described there."""

GUEST_SOURCES = Path(__file__).with_name("guest")
KERNEL_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX_PACKAGE = "busybox-static"

# What the guest needs to answer its first packet is loaded first, the rest right after.
EARLY_MODULES = ("virtio_pci", "qemu_fw_cfg", "bridge", "veth")
NIC_MODULES = ("virtio_net",)
LATE_MODULES = ("button", "evdev", "pvpanic-mmio", "virtio_blk", "virtio_scsi", "sd_mod")
NFS_MODULES = ("nfsv4",)
"""Loaded only where the EVM has a mount."""
DISK_MODULES = ("virtio_pci", "virtio_scsi", "sd_mod", "crc32c_generic", "ext4")
"""What the image `debian` mounts its root disk with."""
POD_MODULES = ("qemu_fw_cfg", "virtio_net", "macvlan", "button", "evdev", "pvpanic-mmio")
"""The rest of what it needs."""
MODULES = (*EARLY_MODULES, *NIC_MODULES, *LATE_MODULES, *NFS_MODULES, *DISK_MODULES, *POD_MODULES)

SHELL_RC = "alias ll='ls -l'\n"

RECIPE = repr((RECIPE_VERSION, EARLY_MODULES, NIC_MODULES, LATE_MODULES, NFS_MODULES, SHELL_RC))

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Image:
    """A bootable guest image. ``digest``: SHA-256 of kernel and initrd; nodes with equal ones boot the same guest.

    ``disk``: what a root volume is made from (raw), for an image that boots from one.
    """

    name: str
    digest: str
    kernel: Path
    initrd: Path
    kernel_version: str
    recipe_version: int = RECIPE_VERSION
    disk: Path | None = None
    pod_ipv6: bool = True
    """see ``emp.agent.images.NodeImage``"""


def default_cache() -> Path:
    """Return ``$EMP_CACHE``, else ``~/.cache/emp``."""
    return Path(os.environ.get("EMP_CACHE") or Path.home() / ".cache" / "emp")


def ensure_image(
    name: str = "micro", cache: Path | None = None, *, refresh: bool = False, notice: Notice = lambda line: None
) -> Image:
    """Return the image, building it first when the cache has none for the present sources.

    ``notice`` gets a line of text before anything that takes time. ``refresh`` asks apt for the newest kernel even if
    one is cached. Raises BadInput for an unknown name, MissingDependency when a package or the compiler is missing.
    """
    if name != "micro":
        raise BadInput(f"there is no image {name!r}", field="image", hint="the image is called micro")
    cache = cache or default_cache()
    kernel = ensure_kernel(cache, refresh=refresh, notice=notice)
    busybox = ensure_busybox(cache, notice=notice)
    inputs = hash_inputs([*guest_files(), busybox, kernel / "kernel"], kernel.name)
    home = cache / "images" / f"{name}-{inputs[:16]}"
    if not (home / "image.json").exists():
        notice(f"building the guest image {name} (kernel {kernel.name}) into {home}")
        publish(home, lambda target: _build(target, name, kernel, busybox))
    return read_image(home)


def guest_files() -> list[Path]:
    """Return the guest's own sources, in a fixed order."""
    return sorted(path for path in GUEST_SOURCES.iterdir() if path.name == "init" or path.suffix in (".c", ".h"))


def hash_inputs(files: Iterable[Path], kernel_version: str) -> str:
    """Return the cache key: recipe version, kernel package version, and name and size or content of each file.

    Kernel and busybox come from versioned packages and are large: the first megabyte and the size stand for them.
    """
    digest = hashlib.sha256(f"{RECIPE}\0{kernel_version}\0".encode())
    for path in files:
        with path.open("rb") as stream:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            digest.update(hashlib.sha256(stream.read(1 << 20)).digest())
    return digest.hexdigest()


def publish(home: Path, build: Callable[[Path], None]) -> None:
    """Fill a directory aside and rename it to ``home``: others see all of it or nothing. A racing builder may win."""
    home.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=home.parent))
    try:
        build(aside)
        aside.chmod(0o755)
        try:
            aside.rename(home)
        except OSError:
            if not home.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# ---- packages -----------------------------------------------------------------------------------------------------


def run_tool(argv: Sequence[str], *, cwd: Path | None = None, need: str, last_lines: int = 0) -> str:
    """Run a tool and return its output; ``need`` says in the error what to do about a failure.

    ``last_lines``: so many of what it said are in the error, and not its command line; 0: all.
    """
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MissingDependency(f"{argv[0]} is not installed", hint=need) from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        if last_lines:
            raise MissingDependency("\n".join(said.splitlines()[-last_lines:]), hint=need)
        raise MissingDependency(f"{' '.join(argv)}: {said}", hint=need)
    return done.stdout


def unpack_package(package: str, into: Path) -> str:
    """Download a Debian package, unpack it below ``into`` and return its version. The host is left as it is."""
    need = f"the package {package} is needed: check the apt sources and the network, run apt-get update, and try again"
    with tempfile.TemporaryDirectory(prefix="emp-deb-") as temp:
        Path(temp).chmod(0o777)  # apt downloads as a user of its own
        run_tool(["apt-get", "download", package], cwd=Path(temp), need=need)
        deb = next(Path(temp).glob("*.deb"))
        run_tool(["dpkg-deb", "-x", str(deb), str(into)], need=need)
        return run_tool(["dpkg-deb", "-f", str(deb), "Version"], need=need).strip()


def kernels_of(cache: Path) -> Path:
    """Return where the kernels are that were unpacked as they are now wanted, a directory for each version."""
    wanted = repr((KERNEL_FORMAT, sorted(MODULES)))
    return cache / "kernels" / hashlib.sha256(wanted.encode()).hexdigest()[:8]


def ensure_kernel(cache: Path, *, refresh: bool = False, notice: Notice = lambda line: None) -> Path:
    """Return the directory of the newest cached kernel: ``kernel`` and ``modules/``, named by its version."""
    kernels = kernels_of(cache)
    cached = sorted(kernels.glob("[!.]*/kernel"), key=lambda path: path.stat().st_mtime) if kernels.is_dir() else []
    if cached and not refresh:
        return cached[-1].parent
    notice(f"downloading Debian's cloud kernel ({KERNEL_PACKAGE}, about 27 MB)")
    need = f"{KERNEL_PACKAGE} is needed: check the apt sources, run apt-get update, and try again"
    depends = run_tool(["apt-cache", "depends", "--no-recommends", KERNEL_PACKAGE], need=need)
    found = re.search(r"Depends: (linux-image-\S+-cloud-amd64)$", depends, re.MULTILINE)
    if not found:
        raise MissingDependency(f"apt knows no kernel behind {KERNEL_PACKAGE}", hint=need)
    with tempfile.TemporaryDirectory(prefix="emp-kernel-") as temp:
        root = Path(temp)
        home = kernels / unpack_package(found[1], root)
        if not home.exists():
            publish(home, lambda target: _pick_kernel(root, target))
    return home


def _pick_kernel(root: Path, target: Path) -> None:
    vmlinuz = next((root / "boot").glob("vmlinuz-*"))
    modules = target / "modules"
    modules.mkdir()
    tree = module_tree(root)
    for module in module_order(tree, MODULES):
        shutil.copy(module, modules / module.name)
    shutil.copy(tree / "modules.builtin", modules)
    (target / "kernel").write_bytes(uncompressed_kernel(vmlinuz.read_bytes()))


def module_tree(root: Path) -> Path:
    """Return the directory of the modules in an unpacked kernel package, each as a plain ``.ko``.

    Debian 12 has them plain below /lib, Debian 13 packed with xz below /usr/lib.
    """
    homes = [home for home in (root / "lib" / "modules", root / "usr" / "lib" / "modules") if home.is_dir()]
    tree = next(homes[0].iterdir())
    for packed in tree.rglob("*.ko.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
    return tree


def uncompressed_kernel(image: bytes) -> bytes:
    """Return the ELF kernel in a bzImage, or the bzImage itself where it is not packed with LZ4.

    QEMU boots the ELF by its PVH entry, without the unpacking that costs 0.5 s under emulation. The formats: the
    kernel's Documentation/arch/x86/boot.rst (payload_offset), LZ4's legacy frame. liblz4 is there wherever apt is.
    """
    setup_sectors, offset, length = image[0x1F1] or 4, *struct.unpack_from("<II", image, 0x248)
    payload = memoryview(image)[(setup_sectors + 1) * 512 + offset :][:length]
    try:
        library = ctypes.CDLL("liblz4.so.1")
    except OSError:
        return image
    if bytes(payload[:4]) != b"\x02\x21\x4c\x18":
        return image
    unpacked, block, at = bytearray(), ctypes.create_string_buffer(8 << 20), 4
    while at + 4 < len(payload) - 4:  # the last word is the unpacked size
        (size,) = struct.unpack_from("<I", payload, at)
        got = library.LZ4_decompress_safe(bytes(payload[at + 4 : at + 4 + size]), block, size, len(block))
        if got < 0:
            return image
        unpacked += memoryview(block)[:got]
        at += 4 + size
    return bytes(unpacked) if unpacked.startswith(b"\x7fELF") else image


def module_order(tree: Path, wanted: Sequence[str]) -> list[Path]:
    """Return the module files to load for ``wanted``, dependencies first, as ``modprobe --show-depends`` would.

    The dependencies are read from the modules themselves (``depends=`` in their .modinfo), because a package that is
    not installed has no modules.dep. What is built in is left out. Raises MissingDependency.
    """
    files = {path.name[:-3].replace("-", "_"): path for path in tree.rglob("*.ko")}
    built_in = {Path(line).stem.replace("-", "_") for line in (tree / "modules.builtin").read_text().split()}
    order: list[Path] = []

    def visit(name: str) -> None:
        name = name.replace("-", "_")
        if name in built_in:
            return
        if name not in files:
            raise MissingDependency(f"the kernel has no module {name}", hint=f"a newer or older {KERNEL_PACKAGE} may")
        if files[name] in order:
            return
        for field in files[name].read_bytes().split(b"\0"):
            if field.startswith(b"depends="):
                for dependency in filter(None, field[8:].decode().split(",")):
                    visit(dependency)
        order.append(files[name])

    for name in wanted:
        visit(name)
    return order


def ensure_busybox(cache: Path, *, notice: Notice = lambda line: None) -> Path:
    """Return a static busybox: the host's own, else one from its package, kept in the cache."""
    host, cached = Path("/bin/busybox"), cache / "busybox" / "busybox"
    if host.exists() and _is_static(host):
        return host
    if not cached.exists():
        notice(f"downloading {BUSYBOX_PACKAGE}")
        with tempfile.TemporaryDirectory(prefix="emp-busybox-") as temp:
            unpack_package(BUSYBOX_PACKAGE, Path(temp))
            found = next(path for path in Path(temp).rglob("busybox") if path.is_file() and path.parent.name == "bin")
            publish(cached.parent, lambda target: _copy(found, target / "busybox"))
    return cached


def _copy(source: Path, target: Path) -> None:
    shutil.copy(source, target)


def _is_static(program: Path) -> bool:
    """Whether an ELF program names no dynamic loader in its first page, where the program headers are."""
    with program.open("rb") as stream:
        head = stream.read(4096)
    return head.startswith(b"\x7fELF") and b"/ld-linux" not in head and b"/ld64" not in head


# ---- the initramfs -------------------------------------------------------------------------------------------------


def _build(target: Path, name: str, kernel: Path, busybox: Path) -> None:
    service = target / "emp-guest"
    compile_service(service)
    entries: list[tuple[str, int, bytes]] = [
        (directory, stat.S_IFDIR | 0o755, b"")
        for directory in ("bin", "dev", "etc", "lib", "lib/modules", "proc", "root", "run", "sys", "tmp", "var")
    ]
    entries.append(("dev/console", stat.S_IFCHR | 0o600, b""))
    entries.append(("init", stat.S_IFREG | 0o755, (GUEST_SOURCES / "init").read_bytes()))
    entries.append(("etc/shrc", stat.S_IFREG | 0o644, SHELL_RC.encode()))
    entries.append(("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()))
    entries.append(("bin/emp-guest", stat.S_IFREG | 0o755, service.read_bytes()))
    for applet in run_tool([str(busybox), "--list"], need=f"install {BUSYBOX_PACKAGE}").split():
        if applet != "busybox":
            entries.append((f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox"))
    loaded: set[str] = set()
    for stage, wanted in (("early", EARLY_MODULES), ("nic", NIC_MODULES), ("late", LATE_MODULES)):
        entries.extend(module_entries(kernel, stage, wanted, loaded))
    # Packed: it takes the guest 2 MB of memory, which a migration has to carry, instead of 6.
    packed = gzip.compress(cpio(module_entries(kernel, "nfs", NFS_MODULES, loaded)), mtime=0)
    entries.append(("lib/modules/nfs.cpio.gz", stat.S_IFREG | 0o644, packed))
    service.unlink()
    finish(target, name, kernel, entries)


def compile_service(program: Path) -> None:
    """Make the guest service, a static program. Raises MissingDependency without a compiler."""
    flags = ["-O2", "-static", "-s", "-pthread", "-Wall", "-Wextra", "-Werror"]
    source = str(GUEST_SOURCES / "service.c")
    run_tool(["gcc", *flags, "-o", str(program), source], need="install gcc and libc6-dev")


def finish(target: Path, name: str, kernel: Path, entries: Iterable[tuple[str, int, bytes]]) -> None:
    """Write kernel, initrd and the image's record."""
    (target / "initrd").write_bytes(cpio(entries))
    os.link(kernel / "kernel", target / "kernel")
    digest = hashlib.sha256((target / "kernel").read_bytes() + (target / "initrd").read_bytes()).hexdigest()
    record = {"name": name, "digest": digest, "kernel_version": kernel.name, "recipe_version": RECIPE_VERSION}
    (target / "image.json").write_text(json.dumps(record, indent=1) + "\n")


def read_image(home: Path) -> Image:
    """Return the image in a directory of the cache."""
    record, disk = json.loads((home / "image.json").read_text()), home / "disk.raw"
    return Image(**record, kernel=home / "kernel", initrd=home / "initrd", disk=disk if disk.exists() else None)


def module_entries(kernel: Path, stage: str, wanted: Sequence[str], loaded: set[str]) -> list[tuple[str, int, bytes]]:
    """Return the files of the modules of one stage that no earlier one has ``loaded``, and the list of them."""
    modules = [path for path in module_order(kernel / "modules", wanted) if path.name not in loaded]
    loaded.update(path.name for path in modules)
    listing = "".join(f"{path.name}\n" for path in modules)
    return [
        *((f"lib/modules/{path.name}", stat.S_IFREG | 0o644, path.read_bytes()) for path in modules),
        (f"lib/modules/{stage}", stat.S_IFREG | 0o644, listing.encode()),
    ]


def cpio(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """Return a newc cpio archive of (path, mode, content or link target), the same bytes for the same entries.

    The format is in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. A character device in it
    is /dev/console (5, 1), the only one that the kernel wants before devtmpfs is there.
    """
    archive = bytearray()
    for inode, (path, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        encoded = path.encode() + b"\0"
        device = (5, 1) if stat.S_ISCHR(mode) else (0, 0)
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        archive += bytes(-len(archive) % 4)
        archive += data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def main(argv: Sequence[str] | None = None) -> int:
    """Build the image by hand; prints what it does, and the image as JSON at the end."""
    parser = argparse.ArgumentParser(prog="python -m emp.lab.images", description="Build the guest image `micro`.")
    parser.add_argument("--refresh", action="store_true", help="look for a newer kernel package first")
    options = parser.parse_args(argv)
    try:
        image = ensure_image(refresh=options.refresh, notice=lambda line: print(line, file=sys.stderr, flush=True))
    except MissingDependency as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(asdict(image), default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
