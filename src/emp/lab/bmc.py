"""The nodes' power switch as a service, as BMCs have it: ``python -m emp.lab.bmc --config FILE``.

=============================  ===================  ==========================================================
``GET /v1/power/{node}``                            -> ``{"state": "on"}``; what runs there now decides
``PUT /v1/power/{node}``       ``{"state": "off"}``  -> the same once it is so; idempotent
=============================  ===================  ==========================================================

Mutual TLS with the pool's certificates: it is ``power-main``, and obeys the controller alone. It listens in the network
of the place ``bmc`` and lives in the machine's other namespaces, from where it can end places and make them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI

from emp.fencing.lab import PREFIX, PowerState
from emp.lab import power
from emp.lab.power import Power
from emp.lab.state import LabFiles
from emp.model.base import Model
from emp.model.names import Ip, Name
from emp.wire import process
from emp.wire.config import read_config
from emp.wire.faults import install_error_handlers
from emp.wire.guard import require_role
from emp.wire.identity import Role
from emp.wire.process import told_to_end
from emp.wire.serve import Listener, Server
from emp.wire.sockets import listen
from emp.wire.tls import mutual_server

log = logging.getLogger("emp.lab.bmc")


class Config(Model):
    pool: Name
    """also the lab's name"""
    address: Ip
    port: int
    credentials: Path


def make_app(files: LabFiles) -> FastAPI:
    """Return the app that switches the nodes of one lab."""
    app = FastAPI(title="EMP lab power switch")
    install_error_handlers(app)
    router = APIRouter(prefix=PREFIX, dependencies=[Depends(require_role(Role.CONTROLLER))])

    @router.get("/{node}")
    def show(node: str) -> PowerState:
        return PowerState(state=power.state_of(files, node).value)

    @router.put("/{node}")
    def switch(node: str, wanted: PowerState) -> PowerState:
        log.info("%s is switched %s", node, wanted.state)
        power.switch(files, node, Power(wanted.state))
        return PowerState(state=power.state_of(files, node).value)

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    app.include_router(router)
    return app


async def serve(path: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    config = read_config(Config, path)
    over = told_to_end()
    app = make_app(LabFiles(config.pool))
    with listen(config.address, config.port, field="port") as socket:
        async with Server(app, [Listener(socket, mutual_server(config.credentials))], pool=config.pool):
            log.info("switches the nodes of %s at %s port %d", config.pool, config.address, config.port)
            await over.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    return process.main("python -m emp.lab.bmc", "A lab's power switch.", serve, arguments)


if __name__ == "__main__":
    sys.exit(main())
