"""Builds and caches the `debian` guest image: a Debian with systemd and podman, which plays Kubernetes pods.

The root disk is made by mmdebstrap from packages of the machine's own release, out of the sources that its apt is set
up with, and finished by ``guest/debian/customize``; root volumes are copies of it (``emp evm create --root``). Kernel
and initrd lie on the nodes, as those of `micro` do. The pods' image is made here too: a guest fetches nothing.
``python -m emp.lab.debian`` builds it by hand.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from emp.lab.images import (
    DISK_MODULES,
    GUEST_SOURCES,
    POD_MODULES,
    Image,
    Notice,
    compile_service,
    default_cache,
    ensure_busybox,
    ensure_kernel,
    finish,
    guest_files,
    hash_inputs,
    module_entries,
    publish,
    read_image,
    run_tool,
)
from emp.model.errors import MissingDependency

NAME = "debian"
DISK_MIB = 384
"""Size of the disk as it is built; the guest grows its file system to the size of its volume."""
PACKAGES = (
    *("systemd", "podman", "netavark", "iptables", "catatonit", "crun", "dbus", "iproute2", "usr-is-merged"),
    *("qemu-guest-agent", "util-linux-extra"),  # the latter for hwclock, without which the former sets no clock
)
LEFT_OUT = ("man", "doc", "info", "locale")
"""Folders of /usr/share."""
SOURCES = GUEST_SOURCES / "debian"
NEED = "install mmdebstrap and e2fsprogs (scripts/setup --dev does), run apt-get update, and try again"
_FETCHING = re.compile(r"Acquire::(https?|Retries|Check-|ForceIPv)")
"""Options of apt that say how to reach its sources."""


def ensure_debian(cache: Path | None = None, *, notice: Notice = lambda line: None) -> Image:
    """Return the image, building it first (a minute, as root) when the cache has none for the present recipe.

    Raises MissingDependency where mmdebstrap, a package or root is missing.
    """
    cache = cache or default_cache()
    kernel = ensure_kernel(cache, notice=notice)
    busybox = ensure_busybox(cache, notice=notice)
    home = _home(cache, kernel, busybox)
    if not (home / "image.json").exists():
        if os.geteuid() != 0:
            raise MissingDependency(f"root is needed to build the guest image {NAME}", hint="run the same as root")
        notice(f"building the guest image {NAME} with mmdebstrap (about a minute) into {home}")
        publish(home, lambda target: _build(target, kernel, busybox))
        _give_to_the_owner(cache, home)
    return replace(read_image(home), pod_ipv6=False)  # podman kube play has no way to give one


def is_built(cache: Path | None = None) -> bool:
    """Whether the cache has the image for the present recipe, so that nothing has to be fetched for it."""
    cache = cache or default_cache()
    return (_home(cache, ensure_kernel(cache), ensure_busybox(cache)) / "image.json").exists()


def _home(cache: Path, kernel: Path, busybox: Path) -> Path:
    return cache / "images" / f"{NAME}-{recipe(busybox, kernel)[:16]}"


def recipe(busybox: Path, kernel: Path) -> str:
    """Return the cache key: release, packages, and the content of each file that goes into it."""
    laid = sorted(path for path in SOURCES.rglob("*") if path.is_file())
    names = [str(path.relative_to(SOURCES)) for path in laid]
    files = hash_inputs([*guest_files(), *laid, busybox, kernel / "kernel"], kernel.name)
    said = repr((_codename(), DISK_MIB, PACKAGES, LEFT_OUT, DISK_MODULES, POD_MODULES, names, files))
    return hashlib.sha256(said.encode()).hexdigest()


def _build(target: Path, kernel: Path, busybox: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="emp-debian-", dir="/var/tmp") as temp:
        files, options = Path(temp, "files"), Path(temp, "apt.conf")
        shutil.copytree(SOURCES / "root", files)
        compile_service(files / "usr/local/sbin/emp-guest")
        options.write_text("".join(f"{line}\n" for line in _apt_options()))
        argv = ["mmdebstrap", "--quiet", "--mode=root", "--variant=essential", "--format=null"]
        argv += ["--dpkgopt=force-unsafe-io", "--skip=cleanup/apt"]
        argv += [f"--include={','.join(PACKAGES)}", f"--aptopt={options}"]
        argv += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in LEFT_OUT]
        argv += ["--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr", f"--customize-hook={SOURCES / 'customize'}"]
        given = {"EMP_FILES": files, "EMP_BUSYBOX": busybox, "EMP_DISK": target / "disk.raw", "EMP_DISK_MIB": DISK_MIB}
        settings = [f"{name}={value}" for name, value in given.items()]
        run_tool(["env", *settings, *argv, _codename(), "/dev/null", *_apt_sources()], need=NEED, last_lines=5)
        (target / "disk.raw").chmod(0o644)
    finish(target, NAME, kernel, _initramfs(kernel, busybox))


def _initramfs(kernel: Path, busybox: Path) -> Iterator[tuple[str, int, bytes]]:
    for directory in ("bin", "dev", "lib", "lib/modules", "proc", "root", "sys"):
        yield directory, stat.S_IFDIR | 0o755, b""
    yield "dev/console", stat.S_IFCHR | 0o600, b""
    yield "init", stat.S_IFREG | 0o755, (SOURCES / "init").read_bytes()
    yield "bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()
    for applet in run_tool([str(busybox), "--list"], need=NEED).split():
        if applet != "busybox":
            yield f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox"
    loaded: set[str] = set()
    yield from module_entries(kernel, "disk", DISK_MODULES, loaded)
    yield from module_entries(kernel, "rest", POD_MODULES, loaded)


def _codename() -> str:
    """Return the machine's own release: its sources are known to have it."""
    found = re.search(r'^VERSION_CODENAME="?([a-z]+)"?$', Path("/etc/os-release").read_text(), re.MULTILINE)
    if not found:
        raise MissingDependency("this machine's release has no code name", hint="build the image on a Debian release")
    return found[1]


def _apt_sources() -> list[str]:
    """Return the files, by apt's own account, that carry the release's main component."""
    codename = _codename()
    wanted = {f"{suite} main" for suite in (codename, f"{codename}-updates", f"{codename}-security")}
    told = run_tool(["apt-get", "indextargets", "--format", _TARGET, "Created-By: Packages"], need=NEED)
    targets = [line.split("\t") for line in told.splitlines()]
    files = [entry.rpartition(":")[0] for name, entry in targets if name in wanted]
    if not files:
        raise MissingDependency(f"no package list of {codename} main is here", hint=NEED)
    return list(dict.fromkeys(files))


_TARGET = "$(RELEASE) $(COMPONENT)\t$(SOURCESENTRY)"


def _apt_options() -> list[str]:
    dumped = run_tool(["apt-config", "dump", "Acquire"], need=NEED).splitlines()
    return [line for line in dumped if _FETCHING.match(line)]


def _give_to_the_owner(cache: Path, home: Path) -> None:
    """Let who owns the cache remove what root has built in it."""
    owner = cache.stat()
    for path in (home.parent, home, *home.iterdir()):
        os.chown(path, owner.st_uid, owner.st_gid)


def main() -> int:
    """Build it; prints where it is."""
    try:
        image = ensure_debian(notice=lambda line: print(line, file=sys.stderr, flush=True))
    except MissingDependency as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(image.disk)
    return 0


if __name__ == "__main__":
    sys.exit(main())
