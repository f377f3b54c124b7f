"""What an agent is told at its start: one JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from emp.model.base import Model
from emp.model.errors import BadInput
from emp.model.names import Ip, Name, SizeBytes


class NetworkConfig(Model):
    driver: str = "l2"
    bridge: str = "br0"
    uplink: str = "eth0"


class NvmeDevices(Model):
    """Volumes are NVMe devices of this machine, as on an AWS instance of bare metal."""

    driver: Literal["nvme"] = "nvme"


class ServiceDevices(Model):
    """The volume service says what it has attached to this node (``emp.volumes.devices``)."""

    driver: Literal["service"]
    url: str
    server_name: str = "volumes-main"
    """the common name of its certificate"""


class AgentConfig(Model):
    pool: Name
    node: Name
    address: Ip
    """of this node on the pool's network; API, link and migration streams listen here only"""
    port: int = Field(default=7443, ge=0, le=65535)
    link_port: int = Field(default=7444, ge=0, le=65535)
    controller_url: str
    controller_name: str = "controller-main"
    credentials: Path
    """directory with this agent's certificate (``agent-<node>``)"""
    qemu_credentials: Path
    """directory with the certificate of this node's QEMU processes (``qemu-<node>``)"""
    state_dir: Path = Path("/var/lib/emp")
    run_dir: Path = Path("/run/emp")
    images_dir: Path = Path("/var/lib/emp/images")
    memory_bytes: SizeBytes
    """what this node offers to EVMs"""
    vcpus: int = Field(ge=1)
    network: NetworkConfig = NetworkConfig()
    devices: NvmeDevices | ServiceDevices = Field(default=NvmeDevices(), discriminator="driver")
    """how an attached volume is found that names no endpoint"""
    qemu: Path | None = None
    """another QEMU than the one on PATH"""


def load(path: Path) -> AgentConfig:
    """Read the file; raise ``BadInput`` naming the field that is wrong."""
    try:
        return AgentConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}", field="--config") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(str(first["msg"]), field=".".join(map(str, first["loc"])), hint=f"in {path}") from error
