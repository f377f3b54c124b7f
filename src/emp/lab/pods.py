"""What podman says of the pods in an EVM of the image `debian`, as told at the EVM's own address.

``guest/debian`` answers each connection to ``PORT`` with the output of ``podman container inspect`` for all containers.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any

from emp.lab.guest_control import socket_in
from emp.lab.topology import Topology
from emp.model.errors import Unreachable

PORT = 7781
ANSWER_S = 60.0
LARGEST_BYTES = 1 << 20
"""No answer is larger, 11 kB for each container; one that is comes from something else, and may have no end."""


@dataclass(frozen=True)
class Container:
    """One container of a pod. Equal, if nothing has happened to it between two looks."""

    name: str
    id: str
    pod: str
    """id of its pod"""
    pid: int
    """in the EVM; 0: it does not run"""
    started_at: str
    restarts: int


def containers(topology: Topology, address: str) -> dict[str, Container]:
    """Return the containers in the EVM at ``address`` by name. Raises ``Unreachable`` without a whole answer."""
    with socket_in(topology, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_S)
        try:
            connection.connect((address, PORT))
            with connection.makefile("rb") as answer:
                text = answer.read(LARGEST_BYTES + 1)
            if len(text) > LARGEST_BYTES:
                raise ValueError(f"more than {LARGEST_BYTES} bytes at port {PORT}")
            told = json.loads(text)
        except (OSError, ValueError) as error:
            raise Unreachable(f"the EVM at {address} does not tell of its pods: {error}") from error
    return {each["Name"]: _container(each) for each in told}


def _container(told: dict[str, Any]) -> Container:
    state = told["State"]
    return Container(told["Name"], told["Id"], told["Pod"], state["Pid"], state["StartedAt"], told["RestartCount"])
