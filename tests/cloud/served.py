"""A simulated cloud with its data plane: credentials of a pool, its configuration, and who calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emp.aws.api import make_client
from emp.lab.cloud.config import CloudConfig, Node, Segment
from emp.lab.cloud.knobs import Knobs
from emp.model.volume import Attachment, NbdEndpoint
from emp.volumes.devices import ServiceResolver
from emp.volumes.ebs import EbsVolumeDriver, Limits
from emp.wire.http import WireClient
from emp.wire.pki import CertificateAuthority, Identity, Role
from emp.wire.tls import mutual_client
from tests.cloud.simulator import POOL, REGION, ZONE
from tests.nbd_pool import NbdPool

CLOUD = Identity(Role.VOLUMES, "main")
NODES = {f"n{number}": f"i-{number:017x}" for number in range(1, 4)}
GIB = 1 << 30


class CloudPool(NbdPool):
    """As ``NbdPool``; the cloud answers at 127.0.0.1 under an address that its certificate names."""

    def __init__(self, directory: Path, access_key: str, port: int) -> None:
        self.directory = directory
        self._ca = CertificateAuthority.create(directory / "ca", POOL)
        self._ca.issue(CLOUD.role, CLOUD.name, ["127.0.0.1"]).write(directory / CLOUD.cn)
        self.port = port
        self.cloud = CloudConfig(
            address="127.0.0.1",
            port=port,
            nbd_ports=(20000, 20031),
            credentials=directory / CLOUD.cn,
            state_dir=directory / "state",
            pool=POOL,
            access_key=access_key,
            nodes={
                name: Node(instance=instance, zone=ZONE, address=f"10.77.0.{11 + number}")
                for number, (name, instance) in enumerate(NODES.items())
            },
            network=Segment(cidr="10.77.0.0/16", picks={ZONE: "10.77.251.0/25"}),
        )

    def boto(self) -> Any:
        """Return a client of boto3 for what the driver does not ask."""
        url, ca_file = f"https://127.0.0.1:{self.port}", self.directory / CLOUD.cn / "ca-cert.pem"
        return make_client(REGION, endpoint_url=url, ca_file=ca_file, read_s=3.0)

    def driver(self) -> EbsVolumeDriver:
        return EbsVolumeDriver(
            NODES, pool=POOL, region=REGION, zone=ZONE, endpoint_url=f"https://127.0.0.1:{self.port}",
            ca_file=self.directory / CLOUD.cn / "ca-cert.pem", limits=Limits(force_after_s=1.0), read_s=3.0,
        )  # fmt: skip

    def caller(self, identity: Identity) -> WireClient:
        return WireClient(f"https://127.0.0.1:{self.port}", tls=mutual_client(self.credentials(identity)), server=CLOUD)

    def resolver(self, node: str) -> ServiceResolver:
        return ServiceResolver(self.caller(Identity(Role.AGENT, node)))

    async def turn(self, **knobs: Any) -> None:
        """Set the knobs; what is not named is as it is by default, but for request limits: there are none."""
        async with self.caller(Identity(Role.CONTROLLER, "main")) as controller:
            await controller.request("PUT", "/knobs", Knobs(**({"limits": None} | knobs)))

    def log(self, volume: str) -> list[dict[str, Any]]:
        """Return what the cloud has noted of a volume's exports."""
        text = (self.cloud.state_dir / "epochs.log").read_text()
        return [line for line in map(json.loads, text.splitlines()) if line["volume"] == volume]


def at(endpoint: NbdEndpoint, node: str) -> Attachment:
    """Return an attachment as ``NbdPool.io`` wants it: of ``node``, to be found at ``endpoint``."""
    return Attachment(volume=endpoint.export.split(".")[0], node=node, epoch=1, endpoint=endpoint)
