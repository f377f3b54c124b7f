"""Runs the controller: sockets, signals, background work, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from emp.controller.app import agents_app, people_app
from emp.controller.config import Config
from emp.controller.restart import Restarts
from emp.controller.services import Services
from emp.controller.wiring import Controller, open_store, wire
from emp.fencing.base import FenceDriver
from emp.model.errors import EmpError
from emp.volumes.base import VolumeDriver
from emp.wire.process import told_to_end
from emp.wire.serve import Listener, Server
from emp.wire.sockets import adopt, listen
from emp.wire.tls import mutual_server, public_server

log = logging.getLogger(__name__)

HOUSEKEEPING_S = 600.0


@dataclass(frozen=True)
class Running:
    """A controller that serves."""

    services: Services
    restarts: Restarts
    people_port: int
    agents_port: int


async def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises ``EmpError`` when it cannot start."""
    stop = told_to_end()
    async with running(config) as controller:
        log.info(
            "controller of pool %s: people on port %d, agents on %s:%d",
            config.pool, controller.people_port, config.address, controller.agents_port,
        )  # fmt: skip
        await stop.wait()
        log.info("stopping; EVMs and migrations go on")


@asynccontextmanager
async def running(
    config: Config, *, driver: VolumeDriver | None = None, fence_driver: FenceDriver | None = None
) -> AsyncGenerator[Running]:
    """Run a controller for the length of the block; the drivers stand in for services in tests."""
    async with contextlib.AsyncExitStack() as stack:
        people = Listener(_people_socket(config), public_server(config.credentials))
        stack.callback(people.sock.close)
        agents = Listener(listen(config.address, config.port, field="port"), mutual_server(config.credentials))
        stack.callback(agents.sock.close)
        store = await open_store(config)
        stack.push_async_callback(store.close)
        controller = await wire(config, store, driver=driver, fence_driver=fence_driver)
        stack.push_async_callback(controller.close)
        services = controller.services
        await controller.start()
        await stack.enter_async_context(Server(agents_app(services), [agents], pool=config.pool))
        await stack.enter_async_context(Server(people_app(services), [people], pool=config.pool))
        # before the server stops, which would wait for them
        stack.push_async_callback(services.evms.close)
        stack.callback(services.consoles.close)
        await stack.enter_async_context(_background(config, controller))
        yield Running(services, controller.restarts, people.port, agents.port)


def _people_socket(config: Config) -> socket.socket:
    if config.people.fd is not None:
        return adopt(config.people.fd, field="people.fd")
    assert config.people.host is not None and config.people.port is not None
    return listen(config.people.host, config.people.port, field="people.port")


@asynccontextmanager
async def _background(config: Config, controller: Controller) -> AsyncGenerator[None]:
    services = controller.services
    tasks = [
        asyncio.create_task(controller.agents.keep_warm(services.nodes.ready), name="warm connections"),
        asyncio.create_task(services.nodes.watch_over(), name="node watch"),
        asyncio.create_task(_housekeeping(config, services), name="housekeeping"),
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _housekeeping(config: Config, services: Services) -> None:
    """Ask the volume service what it has, and forget old history, now and then."""
    while True:
        try:
            await services.volumes.load()
            if (upto := services.book.revision - config.history_revisions) > 0:
                await services.book.store.compact(upto)
        except EmpError as error:
            log.warning("housekeeping: %s", error)
        await asyncio.sleep(HOUSEKEEPING_S)
