"""The paths of the controller's REST API, answered from what a test's ``Controller`` holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Header, Request, Response
from fastapi.responses import StreamingResponse

from emp.model.api import AbortRequest, FenceRequest, Listing, ReadmitRequest
from emp.model.errors import BadInput, Conflict, NotFound
from emp.model.evm import EvmState
from emp.model.migration import MigrationRequest
from emp.model.node import Fence
from tests.unit.test_cli_canned import ABORTED, CLOCK, ON_THE_WIRE, SHARED, VOL, WEB

if TYPE_CHECKING:
    from tests.unit.test_cli_pool import Controller


def _get(held: dict[str, Any], name: str, field: str) -> Any:
    if name not in held:
        raise NotFound(f"no {field} {name!r}", field=field)
    return held[name]


def routes(pool: Controller) -> None:
    """Put the REST API's paths into the app."""
    app = pool.app

    def listing(held: Any) -> Any:
        return Listing[Any](items=tuple(held), revision=41)

    @app.get("/v1/nodes")
    def nodes() -> Any:
        return listing(pool.nodes.values())

    @app.get("/v1/nodes/{name}")
    def node(name: str) -> Any:
        return _get(pool.nodes, name, "node")

    @app.post("/v1/nodes/{name}/fence")
    def fence(name: str, request: FenceRequest) -> Any:
        node = _get(pool.nodes, name, "node")
        if not request.confirm:
            raise BadInput(
                "fencing it switches n1 off", field="confirm", hint=f"do it: emp node fence {name} --confirm"
            )
        proof = Fence(driver="lab", by=request.reason, at_s=1_700_000_000.0, retire={"web": 8})
        pool.nodes[name] = node.model_copy(update={"fence": proof, "ready": False})
        return pool.nodes[name]

    @app.post("/v1/nodes/{name}/readmit")
    def readmit(name: str, request: ReadmitRequest) -> Any:
        if not request.confirm:
            raise BadInput("it takes that journal for the truth", field="confirm")
        pool.nodes[name] = _get(pool.nodes, name, "node").model_copy(update={"quarantine": None})
        return pool.nodes[name]

    @app.post("/v1/nodes/{name}/{verb}")
    def cordon(name: str, verb: str) -> Any:
        pool.nodes[name] = _get(pool.nodes, name, "node").model_copy(update={"cordoned": verb == "cordon"})
        return pool.nodes[name]

    @app.get("/v1/evms")
    def evms() -> Any:
        return listing(pool.evms.values())

    @app.get("/v1/evms/{name}")
    @app.post("/v1/evms/{name}/start")
    @app.post("/v1/evms/{name}/recover")
    @app.post("/v1/evms/{name}/stop")
    def evm(name: str) -> Any:
        return _get(pool.evms, name, "evm")

    @app.get("/v1/evms/{name}/network")
    def network(name: str) -> Any:
        _get(pool.evms, name, "evm")
        return ON_THE_WIRE

    @app.get("/v1/evms/{name}/clock")
    def clock(name: str) -> Any:
        _get(pool.evms, name, "evm")
        return CLOCK

    @app.post("/v1/evms", status_code=201)
    def create(request: dict[str, Any]) -> Any:
        return WEB

    @app.delete("/v1/evms/{name}", status_code=204)
    def delete(name: str, grace_s: float = 5) -> None:
        pool.told.append(("grace", grace_s))

    @app.get("/v1/evms/{name}/console")
    def read_console(name: str) -> Any:
        if _get(pool.evms, name, "evm").state is not EvmState.RUNNING:
            raise Conflict(f"EVM {name} is stopped: it has no console", field="evm")
        return StreamingResponse(pool.output(), media_type="application/octet-stream")

    @app.post("/v1/evms/{name}/console", status_code=204)
    async def type_at_console(name: str, request: Request) -> None:
        pool.typed += await request.body()

    @app.post("/v1/evms/{name}/migrations", status_code=201)
    def migrate(name: str, request: MigrationRequest, response: Response) -> Any:
        _get(pool.evms, name, "evm")
        return pool.plan.model_copy(update={"dry_run": request.dry_run, "policy": request.policy})

    @app.get("/v1/migrations")
    def migrations(evm: str | None = None) -> Any:
        if evm is not None:
            _get(pool.evms, evm, "evm")
        return listing(m for m in pool.migrations.values() if evm in (None, m.evm))

    @app.get("/v1/migrations/{name}")
    def migration(name: str) -> Any:
        return _get(pool.migrations, name, "migration")

    @app.get("/v1/migrations/{name}/events")
    def events(name: str, last_event_id: Annotated[str | None, Header()] = None) -> Any:
        pool.resumed.append(last_event_id)
        return StreamingResponse(pool.snapshots(int(last_event_id or 0)), media_type="text/event-stream")

    @app.post("/v1/migrations/{name}/abort")
    def abort(name: str, request: AbortRequest) -> Any:
        return ABORTED.model_copy(update={"abort_asked": request.reason})

    @app.get("/v1/volumes")
    def volumes() -> Any:
        return listing(pool.volumes.values())

    @app.get("/v1/volumes/{name}")
    def volume(name: str) -> Any:
        return _get(pool.volumes, name, "volume")

    @app.post("/v1/volumes", status_code=201)
    def create_volume(request: dict[str, Any]) -> Any:
        return SHARED if request["type"] == "shared" else VOL

    @app.post("/v1/volumes/{name}/resize")
    def resize_volume(name: str, request: dict[str, Any]) -> Any:
        return _get(pool.volumes, name, "volume").model_copy(update={"size_bytes": request["size_bytes"]})

    @app.post("/v1/evms/{name}/volumes")
    def attach_volume(name: str, request: dict[str, Any]) -> Any:
        evm = _get(pool.evms, name, "evm")
        return evm.model_copy(update={"spec": evm.spec.with_volume(request["volume"], 5)})

    @app.delete("/v1/evms/{name}/volumes/{volume}")
    def detach_volume(name: str, volume: str, in_use: bool = False) -> Any:
        if not in_use:
            raise Conflict("the guest is using the volume", field="volume")
        return _get(pool.evms, name, "evm")

    @app.delete("/v1/volumes/{name}", status_code=204)
    def delete_volume(name: str) -> None: ...
