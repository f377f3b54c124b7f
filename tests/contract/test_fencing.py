"""What every fence driver must do: proof or an error that says which, never a guess."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import EndpointConnectionError
from botocore.stub import Stubber
from fastapi import Depends, FastAPI

from emp.fencing.base import FenceDriver
from emp.fencing.ec2 import Ec2Fence
from emp.fencing.lab import LabFence, PowerState
from emp.fencing.manual import ManualFence
from emp.model.errors import EmpError, FenceFailed, NotFound, OutcomeUnknown
from emp.wire.faults import install_error_handlers
from emp.wire.guard import require_role
from emp.wire.http import WireClient
from emp.wire.pki import CertificateAuthority, Identity, Role
from emp.wire.serve import Listener, Server
from emp.wire.sockets import listen
from emp.wire.tls import mutual_client, mutual_server
from tests.fakes.power import FakePower

POOL, SWITCH, CONTROLLER = "p", Identity(Role.POWER, "main"), Identity(Role.CONTROLLER, "main")
INSTANCE = "i-0123456789abcdef0"


class Switch:
    """A power switch for node n1, over HTTPS; ``stuck``: it obeys and nothing happens."""

    def __init__(self) -> None:
        self.state = {"n1": "on"}
        self.stuck = False
        self.failing: EmpError | None = None

    def app(self) -> FastAPI:
        app = FastAPI(openapi_url=None, dependencies=[Depends(require_role(Role.CONTROLLER))])
        install_error_handlers(app)

        @app.get("/v1/power/{node}")
        def get(node: str) -> PowerState:
            if node not in self.state:
                raise NotFound(f"there is no node {node}")
            return PowerState.model_validate({"state": self.state[node]})

        @app.put("/v1/power/{node}")
        def put(node: str, wanted: PowerState) -> PowerState:
            get(node)
            if self.failing:
                raise self.failing
            if not self.stuck:
                self.state[node] = wanted.state
            return wanted

        return app


@pytest.fixture
async def switch(tmp_path: Path) -> AsyncIterator[tuple[Switch, LabFence]]:
    """A switch that serves, and the driver of a controller."""
    authority = CertificateAuthority.create(tmp_path / "ca", POOL)
    for who in (SWITCH, CONTROLLER):
        authority.issue(who.role, who.name, ["127.0.0.1"]).write(tmp_path / who.cn)
    made = Switch()
    with listen("127.0.0.1", 0) as socket:
        url = f"https://127.0.0.1:{socket.getsockname()[1]}"
        async with Server(made.app(), [Listener(socket, mutual_server(tmp_path / SWITCH.cn))], pool=POOL):
            driver = LabFence(WireClient(url, tls=mutual_client(tmp_path / CONTROLLER.cn), server=SWITCH), url)
            yield made, driver
            await driver.aclose()


class Cloud:
    """What of EC2 the driver uses: one instance, which stops when it is told to, or only by force."""

    def __init__(self) -> None:
        self.state, self.stubborn = "running", False
        self.calls: list[str] = []

    def describe_instances(self, *, InstanceIds: list[str]) -> Any:  # noqa: N803, boto3's name
        assert InstanceIds == [INSTANCE]
        return {"Reservations": [{"Instances": [{"State": {"Name": self.state}}]}]}

    def stop_instances(self, *, InstanceIds: list[str], Force: bool = False) -> Any:  # noqa: N803
        self.calls.append("force" if Force else "stop")
        self.state = "stopping" if self.stubborn and not Force else "stopped"
        return {}

    def close(self) -> None:
        return


def ec2(client: Any, **limits: float) -> Ec2Fence:
    return Ec2Fence({"n1": INSTANCE}, region="eu-west-1", client=lambda: client, poll_s=0.01, **limits)


@pytest.fixture(params=["manual", "lab", "ec2", "fake"])
async def driver(request: pytest.FixtureRequest, switch: tuple[Switch, LabFence]) -> FenceDriver:
    match request.param:
        case "manual":
            return ManualFence()
        case "lab":
            return switch[1]
        case "ec2":
            return ec2(Cloud())
        case _:
            return FakePower()


async def test_a_fence_is_proof_however_often_it_is_asked_for(driver: FenceDriver) -> None:
    first = await driver.fence("n1", by="ada: it burns")
    again = await driver.fence("n1", by="ada: it burns")
    assert (first.driver, first.by) == (again.driver, again.by)
    assert first.by == "ada: it burns"
    assert (first.retire, first.boot_id) == ({}, ""), "what is owed is the controller's to know"
    for _ in range(2):
        await driver.lift("n1")


async def test_it_says_what_it_would_do(driver: FenceDriver) -> None:
    assert "n1" in driver.describe("n1")


# ------------------------------------------------------------------ the lab's switch


async def test_the_switch_is_believed_when_it_has_been_read(switch: tuple[Switch, LabFence]) -> None:
    made, driver = switch
    await driver.fence("n1", by="a test")
    assert made.state == {"n1": "off"}
    await driver.lift("n1")
    assert made.state == {"n1": "on"}
    made.stuck = True
    with pytest.raises(FenceFailed, match="n1 is on, says its switch"):
        await driver.fence("n1", by="a test")


async def test_a_switch_that_does_not_answer_leaves_it_open(switch: tuple[Switch, LabFence]) -> None:
    made, driver = switch
    made.failing = OutcomeUnknown("timeout")
    with pytest.raises(OutcomeUnknown, match="n1 may or may not be off"):
        await driver.fence("n1", by="a test")
    with pytest.raises(FenceFailed, match="no node n9"):
        await driver.fence("n9", by="a test")


# ------------------------------------------------------------------ EC2


async def test_an_instance_that_does_not_stop_in_order_is_stopped_by_force() -> None:
    cloud = Cloud()
    cloud.stubborn = True
    await ec2(cloud, in_order_s=0.05).fence("n1", by="a test")
    assert cloud.calls == ["stop", "force"]


async def test_an_instance_that_is_not_stopped_is_no_proof() -> None:
    cloud = Cloud()
    cloud.stop_instances = lambda **_: {}  # type: ignore[method-assign]
    with pytest.raises(FenceFailed, match="still running"):
        await ec2(cloud, in_order_s=0.0, by_force_s=0.0).fence("n1", by="a test")
    with pytest.raises(FenceFailed, match="no instance is named for node n2"):
        await ec2(cloud).fence("n2", by="a test")


@pytest.fixture
def stubbed() -> Iterator[tuple[Any, Stubber]]:
    """boto3's own client, its answers recorded: parameters and shapes are checked against the service's model."""
    client = boto3.client("ec2", region_name="eu-west-1", aws_access_key_id="x", aws_secret_access_key="x")
    with Stubber(client) as stubber:
        yield client, stubber
    client.close()


def _described(stubber: Stubber, state: str) -> None:
    answer = {"Reservations": [{"Instances": [{"InstanceId": INSTANCE, "State": {"Code": 64, "Name": state}}]}]}
    stubber.add_response("describe_instances", answer, {"InstanceIds": [INSTANCE]})


async def test_the_calls_and_their_parameters_are_ec2s(stubbed: tuple[Any, Stubber]) -> None:
    client, stubber = stubbed
    _described(stubber, "running")
    stubber.add_response("stop_instances", {"StoppingInstances": []}, {"InstanceIds": [INSTANCE]})
    _described(stubber, "stopping")
    stubber.add_response("stop_instances", {"StoppingInstances": []}, {"InstanceIds": [INSTANCE], "Force": True})
    _described(stubber, "stopping")
    _described(stubber, "stopped")
    proof = await ec2(client, in_order_s=0.0, by_force_s=30.0).fence("n1", by="a test")
    assert proof.driver == "ec2"
    stubber.assert_no_pending_responses()


async def test_what_ec2_refuses_and_what_it_leaves_open_are_two_things(stubbed: tuple[Any, Stubber]) -> None:
    client, stubber = stubbed
    stubber.add_client_error("describe_instances", "UnauthorizedOperation", http_status_code=403)
    with pytest.raises(FenceFailed, match="UnauthorizedOperation"):
        await ec2(client).fence("n1", by="a test")
    stubber.add_client_error("describe_instances", "InternalError", http_status_code=500)
    with pytest.raises(OutcomeUnknown, match="InternalError"):
        await ec2(client).fence("n1", by="a test")


async def test_ec2_out_of_reach_leaves_it_open() -> None:
    cloud = Cloud()

    def unreachable(**_: Any) -> Any:
        raise EndpointConnectionError(endpoint_url="https://ec2.eu-west-1.amazonaws.com")

    cloud.stop_instances = unreachable  # type: ignore[method-assign]
    with pytest.raises(OutcomeUnknown, match="did not answer stop_instances"):
        await ec2(cloud).fence("n1", by="a test")
