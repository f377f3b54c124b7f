"""The store's contract when its process dies: every acknowledged transaction is there, whole and in its place.

Runs on every implementation of the contract suite. Run as a program, this file is the writer that is killed.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from pathlib import Path

import pytest

from emp.store.base import Put, Store, absent, value_is
from tests.contract.test_store import IMPLEMENTATIONS, WAIT_S, closing, keys, revision_of, take

ROOT = Path(__file__).resolve().parents[2]
LANES = 4


async def write_until_killed(store: Store) -> None:
    """Write numbered transactions in several lanes at once, telling of each only when it was acknowledged."""

    async def lane(n: int) -> None:
        count = await store.get(f"/count/{n}")
        for i in itertools.count(int(count.value) + 1 if count else 1):
            ops = [Put(f"/count/{n}", b"%d" % i), Put(f"/item/{n}/{i:06}", b"x" * 500)]
            result = await store.txn(
                [value_is(f"/count/{n}", b"%d" % (i - 1)) if i > 1 else absent(f"/count/{n}")], ops
            )
            os.write(1, f"{n} {i} {result.revision}\n".encode() if result.succeeded else b"broken\n")

    await asyncio.gather(*(lane(n) for n in range(LANES)))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
async def test_killed_in_the_middle_everything_acknowledged_is_there(name: str, tmp_path: Path) -> None:
    implementation = IMPLEMENTATIONS[name]
    location = implementation.locate(tmp_path)
    acknowledged: dict[int, tuple[int, int]] = {}
    for kill in range(3):
        writer = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.unit.test_store_killed", name, location),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        assert writer.stdout is not None
        try:
            async with asyncio.timeout(WAIT_S):
                lines = [await writer.stdout.readline() for _ in range(100 + 37 * kill)]
        finally:
            writer.send_signal(signal.SIGKILL)
            lines += (await writer.stdout.read()).splitlines()
            assert await writer.wait() == -signal.SIGKILL
        for n, i, revision in (map(int, line.split()) for line in lines):
            acknowledged[revision] = (n, i)

        async with closing(await implementation.open(location)) as store:
            counts = {kv.key.removeprefix("/count/"): int(kv.value) for kv in (await store.range("/count/")).kvs}
            for n in range(LANES):
                written = [key.rpartition("/")[2] for key in await keys(store, f"/item/{n}/")]
                assert written == [f"{i:06}" for i in range(1, counts[str(n)] + 1)], "each transaction is whole"
            newest = await revision_of(store)
            first = newest - sum(counts.values())
            items = (event for event in await take(store.watch("/", first), 2 * sum(counts.values())) if not event.last)
            history = {event.revision: (int(event.kv.key[len("/count/") :]), int(event.kv.value)) for event in items}
            assert list(history) == list(range(first + 1, newest + 1)), "the revision sequence has no hole"
            assert acknowledged.items() <= history.items()


if __name__ == "__main__":

    async def main() -> None:
        await write_until_killed(await IMPLEMENTATIONS[sys.argv[1]].open(sys.argv[2]))

    asyncio.run(main())
