"""The simulated cloud on a loopback port, in a thread of its own, for clients that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from emp.aws.api import make_client
from emp.lab.cloud.cloud import Cloud
from emp.lab.cloud.efs import Efs
from emp.lab.cloud.efs_face import EfsFace
from emp.lab.cloud.efs_plane import EfsPlane, NoEfsPlane
from emp.lab.cloud.efs_wire import EfsModel
from emp.lab.cloud.face import Face, make_app
from emp.lab.cloud.knobs import Knobs
from emp.lab.cloud.network_plane import NetworkPlane, NoNetworkPlane
from emp.lab.cloud.plane import DataPlane, NoDataPlane
from emp.lab.cloud.query import Ec2Model
from emp.lab.cloud.records import Instance
from emp.lab.cloud.vpc import Rule, SecurityGroup, Subnet, Vpc
from emp.wire.serve import Listener, Server
from emp.wire.sockets import listen
from emp.wire.tls import public_server

T = TypeVar("T")
POOL, REGION, ZONE, OTHER_ZONE = "p", "eu-west-1", "eu-west-1a", "eu-west-1b"
ACCESS_KEY = "AKIASIMULATEDCLOUD00"
NODES = {f"n{number}": f"i-{number:017x}" for number in range(1, 19)}
FAR = {"far": "i-0000000000000fa00"}
"""a node in another zone"""
SMALL = "i-0000000000005a110"
"""one of a type that takes little, without an interface of its own"""
IPV6 = "fd77:0:0:a::/64"
"""of the first subnet in ZONE"""
SUBNETS = {ZONE: "subnet-0000000000000000a", OTHER_ZONE: "subnet-0000000000000000b"}
SECOND_SUBNET = "subnet-0000000000000000c"
"""another one in ZONE"""
FOREIGN_SUBNET = "subnet-0000000000000000d"
"""of another VPC"""
VPC, FOREIGN_VPC = "vpc-0000000000000000a", "vpc-0000000000000000b"
OPEN, CLOSED, OF_NODES = "sg-00000000000000000", "sg-0000000000000000c", "sg-0000000000000000d"
"""the default group, which lets NFS in from everywhere inside; one that lets nothing in; the nodes' own"""
BEGAN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class HandClock:
    """A clock that stands still until it is told how much later it is."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now_s

    def advance(self, by_s: float) -> None:
        with self._lock:
            self.now_s += by_s

    async def sleep(self, for_s: float) -> None:
        self.advance(for_s)
        await asyncio.sleep(0)


def network() -> Vpc:
    subnets = [
        Subnet(SUBNETS[ZONE], ZONE, "10.77.0.0/24", VPC, ipv6=IPV6),
        Subnet(SUBNETS[OTHER_ZONE], OTHER_ZONE, "10.77.1.0/28", VPC),
        Subnet(SECOND_SUBNET, ZONE, "10.77.2.0/24", VPC),
        Subnet(FOREIGN_SUBNET, "eu-west-1c", "10.78.0.0/24", FOREIGN_VPC),
    ]
    groups = [
        SecurityGroup(OPEN, "default", VPC, (Rule(cidr="10.77.0.0/16"),)),
        SecurityGroup(CLOSED, "closed", VPC),
        SecurityGroup(OF_NODES, "nodes", VPC),
        SecurityGroup("sg-0000000000000000f", "default", FOREIGN_VPC),
    ]
    return Vpc.of(subnets, groups)


@cache
def efs_model() -> EfsModel:
    return EfsModel(Efs(network(), clock=HandClock(), began=BEGAN).actions)


@cache
def service_model() -> Ec2Model:
    return Ec2Model()


class Simulator:
    """One cloud; ``clock`` is its time, ``url`` where it answers, ``ca_file`` who vouches for that."""

    def __init__(
        self,
        credentials: Path,
        plane: DataPlane,
        efs_plane: EfsPlane,
        network_plane: NetworkPlane,
        clock: Callable[[], float],
        access_key: str,
    ) -> None:
        nodes = (_instance(name, ZONE, f"10.77.0.{101 + n}") for n, name in enumerate(NODES.values()))
        small = Instance(SMALL, ZONE, type="t3.micro", subnet=SUBNETS[ZONE], vpc=VPC, groups=(OF_NODES,))
        instances = [*nodes, _instance(FAR["far"], OTHER_ZONE), small]
        self.vpc = network()
        self.cloud = Cloud(instances, clock=clock, began=BEGAN, vpc=self.vpc)
        self.face = Face(
            self.cloud, plane, access_keys={access_key}, model=service_model(), network_plane=network_plane
        )
        self.efs = Efs(self.vpc, clock=clock, began=BEGAN)
        self.efs_face = EfsFace(self.efs, efs_plane, access_keys={access_key}, model=efs_model())
        self.ca_file = credentials / "ca-cert.pem"
        self._credentials = credentials
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="simulated cloud")
        self.port = 0

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def client(self, *, read_s: float = 5.0) -> Any:
        return make_client(REGION, endpoint_url=self.url, ca_file=self.ca_file, read_s=read_s)

    def efs_client(self, *, read_s: float = 5.0) -> Any:
        return make_client(REGION, service="efs", endpoint_url=self.url, ca_file=self.ca_file, read_s=read_s)

    def turn(self, **knobs: Any) -> None:
        """Set the knobs; what is not named is as it is by default."""

        def turn() -> None:
            for face in (self.face, self.efs_face):
                face.turn(Knobs(**knobs))

        self.do(turn)

    def do(self, what: Callable[[], T]) -> T:
        """Run ``what`` in the simulator's own thread, between two requests."""

        async def run() -> T:
            return what()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout=5)

    def asked(self, action: str) -> list[dict[str, str]]:
        """Return the parameters of every request of ``action`` so far."""
        return [parameters for name, parameters in self.face.calls if name == action]

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        with listen("127.0.0.1", 0) as socket:
            self.port = socket.getsockname()[1]
            listener = Listener(socket, public_server(self._credentials))
            async with Server(make_app(self.face, others=[self.efs_face]), [listener], pool=POOL, drain_s=0.1):
                self._ready.set()
                await self._over.wait()

    @contextmanager
    def running(self) -> Iterator[Simulator]:
        self._thread.start()
        assert self._ready.wait(timeout=10)
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join(timeout=10)
            assert not self._thread.is_alive()


@contextmanager
def simulated(
    credentials: Path,
    *,
    plane: DataPlane | None = None,
    efs_plane: EfsPlane | None = None,
    network_plane: NetworkPlane | None = None,
    clock: Callable[[], float] | None = None,
    access_key: str = ACCESS_KEY,
) -> Iterator[Simulator]:
    planes = (plane or NoDataPlane(), efs_plane or NoEfsPlane(), network_plane or NoNetworkPlane())
    made = Simulator(credentials, *planes, clock or HandClock(), access_key)
    with made.running() as simulator:
        yield simulator


def _instance(name: str, zone: str, address: str | None = None) -> Instance:
    return Instance(name, zone, subnet=SUBNETS[zone], vpc=VPC, groups=(OF_NODES,), address=address)
