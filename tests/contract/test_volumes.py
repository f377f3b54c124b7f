"""What every volume driver must do, and what a node sees of it."""

# ruff: noqa: ASYNC220, ASYNC221 - the clients are qemu-io processes, and this loop has nothing else to do

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from emp.model.errors import AlreadyExists, BadInput, Conflict, Forbidden, NotFound, StaleEpoch
from emp.model.volume import Attachment, Volume, VolumeType
from emp.volumes.base import VolumeClaims, VolumeDriver
from emp.volumes.nbd import NbdVolumeClaims, NbdVolumeDriver
from emp.volumes.nbd_probe import export_size_bytes
from emp.volumes.server.app import make_app
from emp.volumes.server.protocol import CreateVolume, new_volume_id
from emp.volumes.server.service import VolumeService
from emp.volumes.shared import SharedVolumeDriver
from emp.wire.pki import CertificateAuthority, Credentials, Identity, Role
from emp.wire.serve import Listener, Server
from emp.wire.sockets import listen
from emp.wire.tls import mutual_client, mutual_server
from tests.nbd_pool import POOL, SERVER, MemoryRegistry, NbdPool, endpoint_of

CONTROLLER = Identity(Role.CONTROLLER, "main")
SIZE_BYTES = 64 << 20
Connect = Callable[[Identity], VolumeDriver]
Claims = Callable[[str], VolumeClaims]


@pytest.fixture
def pool(tmp_path: Path) -> NbdPool:
    return NbdPool(tmp_path / "credentials")


@asynccontextmanager
async def nbd_service(pool: NbdPool, tmp_path: Path) -> AsyncIterator[Connect]:
    """Give a driver that speaks to one and the same service, in the name of whom one likes."""
    with listen("127.0.0.1", 0) as socket:
        port = socket.getsockname()[1]
        service = VolumeService(
            pool.config(tmp_path / "state", port, (20000, 20063)), Credentials.load(pool.credentials(SERVER))
        )
        listener = Listener(socket, mutual_server(pool.credentials(SERVER)))
        clients = []

        def make(identity: Identity) -> VolumeDriver:
            clients.append(pool.client(port, identity))
            return NbdVolumeDriver(clients[-1])

        async with Server(make_app(service), [listener], pool=POOL):
            yield make
            for client in clients:
                await client.aclose()


@pytest.fixture
async def connect(pool: NbdPool, tmp_path: Path) -> AsyncIterator[Connect]:
    async with nbd_service(pool, tmp_path) as connect:
        yield connect


@pytest.fixture
def driver(connect: Connect) -> VolumeDriver:
    return connect(CONTROLLER)


@dataclass(frozen=True)
class Kind:
    """A driver, and how a volume of its comes to be."""

    driver: VolumeDriver
    new: Callable[[], Awaitable[Volume]]
    closes: bool
    """a node that is detached cannot use it any more"""


@asynccontextmanager
async def nbd_kind(pool: NbdPool, tmp_path: Path) -> AsyncIterator[Kind]:
    async with nbd_service(pool, tmp_path) as connect:
        driver = connect(CONTROLLER)
        yield Kind(driver, lambda: driver.create(type=VolumeType.IO2, size_bytes=SIZE_BYTES), closes=True)


@asynccontextmanager
async def shared_kind(pool: NbdPool, tmp_path: Path) -> AsyncIterator[Kind]:
    """Each volume is an NBD server of its own."""
    tls = mutual_client(pool.credentials(CONTROLLER))
    driver = SharedVolumeDriver(MemoryRegistry(), lambda endpoint: export_size_bytes(endpoint, tls))
    names = (f"disk{number}" for number in itertools.count(1))
    with ExitStack() as servers:

        async def new() -> Volume:
            name = next(names)
            image = tmp_path / name
            image.touch()
            os.truncate(image, SIZE_BYTES)
            return await driver.register(servers.enter_context(pool.serving(image, name=name)))

        yield Kind(driver, new, closes=False)


@pytest.fixture(params=[nbd_kind, shared_kind], ids=["nbd", "shared"])
async def kind(pool: NbdPool, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Kind]:
    async with request.param(pool, tmp_path) as kind:
        yield kind


@pytest.fixture
async def claims(pool: NbdPool) -> AsyncIterator[Claims]:
    """Give the claims of a node's agent."""
    made: list[VolumeClaims] = []

    def claims_of(node: str) -> VolumeClaims:
        made.append(NbdVolumeClaims(mutual_client(pool.credentials(Identity(Role.AGENT, node)))))
        return made[-1]

    yield claims_of
    for each in made:
        await each.aclose()


@pytest.fixture
async def volume(driver: VolumeDriver) -> Volume:
    return await driver.create(type=VolumeType.IO2, size_bytes=SIZE_BYTES)


async def test_a_volume_is_known_from_its_making_to_its_deletion(kind: Kind) -> None:
    driver = kind.driver
    assert await driver.list() == ()
    made, other = await kind.new(), await kind.new()
    assert (made.size_bytes, made.attachments) == (SIZE_BYTES, ())
    assert made.id != other.id
    assert made.serial != other.serial
    assert len(made.serial) <= 20, "a disk has room for no more"
    assert await driver.describe(made.id) == made
    assert set(await driver.list()) == {made, other}

    await driver.delete(made.id)
    await driver.delete(made.id)
    assert await driver.list() == (other,)
    for order in (
        driver.describe(made.id),
        driver.attach(made.id, node="n1", epoch=1),
        driver.fence(made.id, epoch=1),
        driver.resize(made.id, SIZE_BYTES),
    ):
        with pytest.raises(NotFound, match=made.id):
            await order
    await driver.detach(made.id, node="n1", epoch=1)


async def test_a_volume_grows_and_what_is_attached_from_then_on_has_the_new_size(
    driver: VolumeDriver, pool: NbdPool, volume: Volume
) -> None:
    before = await driver.attach(volume.id, node="n1", epoch=1)
    for _ in range(2):
        assert (await driver.resize(volume.id, 2 * SIZE_BYTES)).size_bytes == 2 * SIZE_BYTES
    assert (await driver.describe(volume.id)).size_bytes == 2 * SIZE_BYTES
    after = await driver.attach(volume.id, node="n1", epoch=2)
    assert pool.io(before, "write -P 9 0 4k", "flush")
    assert pool.io(after, "read -P 9 0 4k", f"read -P 0 {2 * SIZE_BYTES - 4096} 4k"), "one volume, all of it"
    with pytest.raises(BadInput) as caught:
        await driver.resize(volume.id, SIZE_BYTES)
    assert caught.value.field == "size_bytes"
    with pytest.raises(BadInput):
        await driver.resize(volume.id, 2 * SIZE_BYTES + 512)


async def test_bad_input_names_the_field(kind: Kind) -> None:
    driver, volume = kind.driver, await kind.new()
    for wrong in ("../x", "vol-1", "vol-" + "0" * 300, "shared-" + "0" * 300, "a,b=c", ""):
        with pytest.raises(BadInput) as caught:
            await driver.describe(wrong)
        assert caught.value.field == "volume"
    for node in ("../x", "a,b=c", "N1", "n" * 300):
        with pytest.raises(BadInput) as caught:
            await driver.attach(volume.id, node=node, epoch=1)
        assert caught.value.field == "node"
    with pytest.raises(BadInput) as caught:
        await driver.attach(volume.id, node="n1", epoch=0)
    assert caught.value.field == "epoch"


async def test_an_attached_volume_is_usable_by_its_node(kind: Kind, pool: NbdPool) -> None:
    driver, volume = kind.driver, await kind.new()
    attachment = await driver.attach(volume.id, node="n1", epoch=7)
    assert (attachment.volume, attachment.node, attachment.epoch) == (volume.id, "n1", 7)
    assert await driver.attach(volume.id, node="n1", epoch=7) == attachment
    assert (await driver.describe(volume.id)).attachments == (attachment,)
    assert pool.io(attachment, f"read -P 0 {SIZE_BYTES - 4096} 4k"), "all of it is there, and zero"
    assert not pool.io(attachment, f"read {SIZE_BYTES} 4k"), "and no more than that"


async def test_nothing_stands_in_the_way_of_a_volume_that_can_be_attached(kind: Kind) -> None:
    volume, nodes = await kind.new(), ("n1", "n2")
    found = await kind.driver.obstacles([volume.id], nodes=nodes)
    assert [found.get(node, {}) for node in nodes] == [{}, {}]
    for node in nodes:
        await kind.driver.attach(volume.id, node=node, epoch=1)
    assert kind.driver.name
    assert kind.driver.move_s is None or 0 < kind.driver.move_s < 600


async def test_what_one_node_writes_the_other_reads(kind: Kind, pool: NbdPool) -> None:
    driver, volume = kind.driver, await kind.new()
    first = await driver.attach(volume.id, node="n1", epoch=1)
    second = await driver.attach(volume.id, node="n2", epoch=2)
    assert (await driver.describe(volume.id)).attachments == (first, second)
    assert pool.io(first, "write -P 17 0 64k", "flush")
    assert pool.io(second, "read -P 17 0 64k", "write -P 18 4k 4k", "flush")
    assert pool.io(first, "read -P 17 0 4k", "read -P 18 4k 4k")


async def test_only_the_nodes_own_certificate_opens_it(
    driver: VolumeDriver, pool: NbdPool, volume: Volume, tmp_path: Path
) -> None:
    attachment = await driver.attach(volume.id, node="n1", epoch=1)
    assert pool.is_open(attachment, Identity(Role.QEMU, "n1"))
    assert pool.is_open(attachment, Identity(Role.AGENT, "n1"))
    for other in (Identity(Role.QEMU, "n2"), Identity(Role.AGENT, "n2"), Identity(Role.QEMU, "n10"), CONTROLLER):
        assert not pool.is_open(attachment, other), other

    stranger = NbdPool(tmp_path / "stranger")
    assert not stranger.is_open(attachment, Identity(Role.QEMU, "n1"))
    endpoint = endpoint_of(attachment)
    plain = f"driver=nbd,host={endpoint.host},port={endpoint.port},export={endpoint.export}"
    done = subprocess.run(
        ["qemu-io", "--image-opts", plain, "-c", "read 0 4k"], capture_output=True, timeout=20, check=False
    )
    assert done.returncode != 0


async def test_detaching_closes_it_to_who_still_has_it_open(
    driver: VolumeDriver, pool: NbdPool, volume: Volume
) -> None:
    attachment = await driver.attach(volume.id, node="n1", epoch=1)
    kept = await driver.attach(volume.id, node="n2", epoch=1)
    argv = pool.qemu_io(attachment, Identity(Role.QEMU, "n1"))
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as holder:
        assert holder.stdin and holder.stdout
        holder.stdin.write(b"write -P 1 0 4k\n")
        holder.stdin.flush()
        while b"wrote 4096" not in holder.stdout.readline():
            pass
        await driver.detach(volume.id, node="n1", epoch=1)
        said, _ = holder.communicate(b"write -P 2 0 4k\nquit\n", timeout=20)
    assert b"failed" in said
    assert not pool.is_open(attachment)
    assert pool.io(kept, "read -P 1 0 4k"), "the late write changed nothing"
    assert (await driver.describe(volume.id)).attachments == (kept,)


async def test_detaching_is_idempotent_and_exact(kind: Kind, pool: NbdPool) -> None:
    driver, volume = kind.driver, await kind.new()
    attachment = await driver.attach(volume.id, node="n1", epoch=5)
    for node, epoch in (("n1", 4), ("n1", 6), ("n2", 5)):
        await driver.detach(volume.id, node=node, epoch=epoch)
    assert pool.is_open(attachment)
    assert (await driver.describe(volume.id)).attachments == (attachment,)
    for _ in range(2):
        await driver.detach(volume.id, node="n1", epoch=5)
    assert pool.is_open(attachment) is not kind.closes
    assert (await driver.describe(volume.id)).attachments == ()
    again = await driver.attach(volume.id, node="n1", epoch=5)
    assert pool.is_open(again)


async def test_a_fence_closes_what_is_older_and_refuses_it_for_good(
    driver: VolumeDriver, pool: NbdPool, volume: Volume
) -> None:
    old = await driver.attach(volume.id, node="n1", epoch=3)
    current = await driver.attach(volume.id, node="n2", epoch=4)
    await driver.fence(volume.id, epoch=4)
    await driver.fence(volume.id, epoch=2)
    assert not pool.is_open(old)
    assert pool.is_open(current)
    assert (await driver.describe(volume.id)).attachments == (current,)
    for epoch in (1, 3):
        with pytest.raises(StaleEpoch):
            await driver.attach(volume.id, node="n1", epoch=epoch)
    assert pool.is_open(await driver.attach(volume.id, node="n1", epoch=4))


async def test_a_target_that_claims_shuts_the_source_out(
    driver: VolumeDriver, pool: NbdPool, volume: Volume, claims: Claims
) -> None:
    source = await driver.attach(volume.id, node="n1", epoch=3)
    target = await driver.attach(volume.id, node="n2", epoch=4)
    assert pool.is_open(source), "a candidate changes nothing"
    for _ in range(2):
        await claims("n2").claim(target, epoch=4)
    assert not pool.is_open(source)
    assert pool.is_open(target)
    (left,) = (await driver.describe(volume.id)).attachments
    assert (left.node, left.epoch, left.tag) == ("n2", 4, 4)
    with pytest.raises(StaleEpoch, match="older than 4"):
        await claims("n1").claim(source, epoch=3)


async def test_a_source_that_went_back_keeps_its_session_and_shuts_the_target_out(
    driver: VolumeDriver, pool: NbdPool, volume: Volume, claims: Claims
) -> None:
    source = await driver.attach(volume.id, node="n1", epoch=3)
    target = await driver.attach(volume.id, node="n2", epoch=4)
    await claims("n1").claim(source, epoch=5)
    assert pool.is_open(source)
    assert not pool.is_open(target)
    with pytest.raises(StaleEpoch):
        await claims("n2").claim(target, epoch=4)
    (left,) = (await driver.describe(volume.id)).attachments
    assert (left.epoch, left.tag, left.endpoint) == (3, 5, source.endpoint), "it is the same session, under a new epoch"

    await driver.fence(volume.id, epoch=5)
    assert pool.is_open(source), "a fence is measured against what was claimed"
    await driver.detach(volume.id, node="n1", epoch=3)
    assert not pool.is_open(source)
    with pytest.raises(Conflict, match="not attached to n1"):
        await claims("n1").claim(source, epoch=6)


async def test_an_agent_claims_for_its_own_node_alone(
    connect: Connect, driver: VolumeDriver, volume: Volume, claims: Claims, pool: NbdPool
) -> None:
    attachment = await driver.attach(volume.id, node="n1", epoch=3)
    with pytest.raises(Conflict, match="not attached to n2"):
        await claims("n2").claim(attachment, epoch=9)
    assert pool.is_open(attachment)
    assert attachment.claim is not None
    port = int(attachment.claim.url.rpartition(":")[2])
    order = {"epoch": 9, "node": "n1"}
    for identity, refused in ((Identity(Role.AGENT, "n2"), Forbidden), (Identity(Role.QEMU, "n1"), Forbidden)):
        async with pool.client(port, identity) as client:
            with pytest.raises(refused):
                await client.request("PUT", f"/v1/volumes/{volume.id}/claim", order)
    async with pool.client(port, CONTROLLER) as client:
        await client.request("PUT", f"/v1/volumes/{volume.id}/claim", order)
    assert (await driver.describe(volume.id)).attachments[0].tag == 9


async def test_an_attached_volume_is_not_deleted(kind: Kind, pool: NbdPool) -> None:
    driver, volume = kind.driver, await kind.new()
    attachment = await driver.attach(volume.id, node="n1", epoch=1)
    with pytest.raises(Conflict, match="n1"):
        await driver.delete(volume.id)
    assert pool.is_open(attachment)
    await driver.detach(volume.id, node="n1", epoch=1)
    await driver.delete(volume.id)


async def test_no_more_than_sixteen_nodes_at_once(driver: VolumeDriver, volume: Volume) -> None:
    for number in range(16):
        await driver.attach(volume.id, node=f"n{number}", epoch=1)
    await driver.attach(volume.id, node="n3", epoch=2)
    with pytest.raises(Conflict, match="16"):
        await driver.attach(volume.id, node="n16", epoch=1)


async def test_only_the_controller_may_call(connect: Connect, volume: Volume) -> None:
    for identity in (Identity(Role.AGENT, "n1"), Identity(Role.QEMU, "n1"), SERVER):
        other = connect(identity)
        with pytest.raises(Forbidden):
            await other.attach(volume.id, node="n1", epoch=1)
        with pytest.raises(Forbidden):
            await other.list()


async def test_attaching_is_quick_enough_to_wait_for(driver: VolumeDriver, volume: Volume) -> None:
    took_ms = []
    attachments: list[Attachment] = []
    for epoch in range(1, 11):
        began_s = time.perf_counter()
        attachments.append(await driver.attach(volume.id, node="n1", epoch=epoch))
        took_ms.append((time.perf_counter() - began_s) * 1e3)
    print(f"attach: median {statistics.median(took_ms):.0f} ms, worst {max(took_ms):.0f} ms")
    assert len({(endpoint_of(a).host, endpoint_of(a).port) for a in attachments}) == 10
    assert min(took_ms) < 200


async def test_creating_twice_is_once_and_another_under_that_id_is_refused(pool: NbdPool, tmp_path: Path) -> None:
    """``nbd``: the caller names the volume, so that a lost answer can be asked for again."""
    authority = CertificateAuthority.create(tmp_path / "other-ca", POOL)
    service = VolumeService(
        pool.config(tmp_path / "other", 1, (20064, 20070)), authority.issue(SERVER.role, SERVER.name)
    )
    await service.start()
    try:
        volume, order = new_volume_id(), CreateVolume(type=VolumeType.IO2, size_bytes=SIZE_BYTES)
        assert await service.create(volume, order) == await service.create(volume, order)
        with pytest.raises(AlreadyExists):
            await service.create(volume, order.model_copy(update={"size_bytes": 2 * SIZE_BYTES}))
        assert len(service.list()) == 1
    finally:
        await service.stop()
