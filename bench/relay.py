"""What a relay costs: QEMU's own client on a volume directly, and through both ends of a relay: ``make bench-relay``.

Prints a table and writes ``build/bench/relay.json``. Everything runs on one machine. Directly, QEMU's client has a unix
socket of a ``qemu-nbd``; relayed, it has one of the target's relay, which speaks TLS over loopback to the source's, as
that does to the volume's ``qemu-nbd``. One request at a time gives the time of one; 16 at once what goes through. The
figures are those of ``qemu-img bench``: medians of runs that take turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from emp.host.schedule import before_others
from tests.relay_bench import SIZE_BYTES, RelayBench

RUNS = 5
SHAPES = {
    "read 4 KiB, 1 at once": (4096, 1, 2000, False),
    "write 4 KiB, 1 at once": (4096, 1, 2000, True),
    "read 4 KiB, 16 at once": (4096, 16, 8000, False),
    "read 1 MiB, 16 at once": (1 << 20, 16, 400, False),
    "write 1 MiB, 16 at once": (1 << 20, 16, 400, True),
}
"""name: bytes, at once, how many, writing"""


def once(socket: Path, size_bytes: int, depth: int, count: int, is_writing: bool) -> float:
    """Return seconds a request."""
    what = [*(("-w",) if is_writing else ()), "-s", str(size_bytes), "-d", str(depth), "-c", str(count)]
    done = subprocess.run(
        ["qemu-img", "bench", *what, "--image-opts", f"driver=nbd,path={socket}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    took = re.search(r"Run completed in ([\d.]+) seconds", done.stdout)
    assert took, done.stdout
    return float(took[1]) / count


@contextlib.contextmanager
def served(image: Path, socket: Path) -> Iterator[None]:
    """Serve the volume's file on a unix socket, by a ``qemu-nbd`` like the volume server's."""
    pid_file = socket.with_suffix(".pid")
    options = ["--cache", "writethrough", "--persistent", "--shared", "0", "--fork", "--pid-file", str(pid_file)]
    subprocess.run(["qemu-nbd", *options, "--socket", str(socket), "--format", "raw", str(image)], check=True)
    try:
        yield
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGTERM)


async def measure(directory: Path) -> list[dict[str, Any]]:
    bench = RelayBench(directory)
    try:
        volume = await bench.volume("n1")
        ways = {"direct": directory / "direct", "relayed": await bench.pair(volume.endpoint)}
        rows = []
        for name, (size_bytes, depth, count, is_writing) in SHAPES.items():
            took: dict[str, list[float]] = {way: [] for way in ways}
            with served(volume.image, ways["direct"]):
                for _ in range(RUNS):
                    for way, socket in ways.items():
                        took[way].append(await asyncio.to_thread(once, socket, size_bytes, depth, count, is_writing))
            medians = {way: statistics.median(each) for way, each in took.items()}
            figures = {f"{way}_ms": round(each * 1000 * depth, 3) for way, each in medians.items()}
            figures |= {f"{way}_mib_per_s": round(size_bytes / each / (1 << 20), 1) for way, each in medians.items()}
            rows.append({"case": name, "runs": RUNS, **figures})
        return rows
    finally:
        await bench.close()


def main() -> None:
    before_others()
    with tempfile.TemporaryDirectory(prefix="emp-bench-") as directory:
        rows = asyncio.run(measure(Path(directory)))
    table = Table(
        "", "direct", "relayed", "times", title=f"A request, median of {RUNS} runs; volume of {SIZE_BYTES >> 20} MiB"
    )
    for row in rows:
        ways = [f"{row[f'{way}_ms']:.2f} ms, {row[f'{way}_mib_per_s']:.0f} MiB/s" for way in ("direct", "relayed")]
        table.add_row(row["case"], *ways, f"{row['relayed_ms'] / row['direct_ms']:.1f}")
    Console().print(table)
    path = Path("build/bench/relay.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
