"""An EVM on storage that needs no attachment: an NBD server of somebody's own, under TLS, that every node reaches."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emp.lab import places
from emp.lab.journal_check import check_journal
from emp.lab.topology import VOL
from emp.model.volume import VolumeType
from emp.volumes.server.tls import write_tls_directory
from emp.wire.identity import Role
from emp.wire.pki import CertificateAuthority
from tests.lab.conftest import Pool
from tests.lab.pool import subject, until

PORT = 10809
SIZE_BYTES = 32 << 20
JOURNAL_HZ = 100
ROUNDS = 2


@contextmanager
def store(pool: Pool) -> Iterator[tuple[str, Path]]:
    """Serve a file on the network of the lab's volume server. Yield its URL and the file."""
    place = pool.topology.place(VOL.name)
    home = pool.files.data(VOL.name) / "store"
    home.mkdir()
    image = home / "disk.raw"
    image.touch()
    os.truncate(image, SIZE_BYTES)
    authority = CertificateAuthority.load(pool.files.ca)
    write_tls_directory(authority.issue(Role.VOLUMES, "store", [place.address]), home / "tls")
    creds = {"qom-type": "tls-creds-x509", "id": "tls", "endpoint": "server", "verify-peer": True}
    argv = ["qemu-nbd", "--persistent", "--shared", "0", "--object", json.dumps(creds | {"dir": str(home / "tls")})]
    argv += ["--tls-creds", "tls", "--bind", place.address, "--port", str(PORT), "--export-name", "disk"]
    argv += ["--format", "raw", "--cache", "writethrough", str(image)]
    network = f"--net=/proc/{places.init_of(pool.files, VOL.name).pid}/ns/net"
    with subprocess.Popen(["nsenter", network, *argv]) as server:  # nsenter becomes it: the pid is the server's
        try:
            listening = f":{PORT:04X} "
            until(lambda: listening in Path(f"/proc/{server.pid}/net/tcp").read_text(), "the store listens")
            yield f"nbds://{place.address}/disk", image
        finally:
            server.kill()
    for path in sorted(home.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    home.rmdir()


def test_an_evm_on_shared_storage_moves_there_and_back_and_nothing_is_lost(pool: Pool) -> None:
    with store(pool) as (url, image):
        volume = pool.json("volume", "create", "shared", "--url", url)
        assert (volume["type"], volume["size_bytes"]) == (VolumeType.SHARED, SIZE_BYTES), "read from the export"
        refused = pool.emp("volume", "create", "shared", "--url", url, check=False)
        assert (refused.returncode, volume["id"] in refused.stderr) == (4, True)
        try:
            with subject(pool, node="n1", volumes=[volume["id"]]) as evm:
                boot_id = evm.boot_id
                evm.start_journal(evm.volumes[0], JOURNAL_HZ)
                for target in ("n2", "n1") * ROUNDS:
                    evm.migrate(target)
                    evm.check_only_on(target)
                    assert [a.node for a in evm.volumes[0].attachments] == [target]
                assert evm.boot_id == boot_id
                (journal,) = evm.guest().ask(f"journal stop {evm.volumes[0].serial}")
                found = check_journal(image)
                assert found.ok, found.errors
                assert (found.missing(journal["acked_seq"]), journal["errors"]) == (0, 0)
                assert journal["acked_seq"] > JOURNAL_HZ
                assert found.boot_ids == (boot_id,)
        finally:
            pool.emp("volume", "delete", volume["id"])
        assert check_journal(image).records == found.records, "the pool has forgotten it, and it is all there"


def test_a_server_that_is_not_believed_becomes_no_volume(pool: Pool) -> None:
    with store(pool) as (url, _):
        refused = pool.emp(
            "volume", "create", "shared", "--url", f"{url}?tls-hostname=other", "--size", "32MiB", check=False
        )
        assert (refused.returncode, "is not believed" in refused.stderr) == (5, True), refused.stderr
