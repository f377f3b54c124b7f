"""EVMs: create, list, show, start, stop, delete, and their console."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, status
from fastapi.responses import StreamingResponse

from emp.controller.services import Services
from emp.model.api import EvmCreate, EvmStart, EvmStop, Listing, VolumeAttach
from emp.model.clock import GuestClock
from emp.model.evm import Evm
from emp.model.network import EvmNetwork


def router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1/evms", tags=["evms"])
    evms = services.evms

    @router.get("")
    async def list_evms() -> Listing[Evm]:
        return Listing[Evm](items=tuple(services.book.evms.all()), revision=services.book.revision)

    @router.post("", status_code=status.HTTP_201_CREATED)
    async def create_evm(request: EvmCreate) -> Evm:
        """Answers once the EVM's QEMU runs; a create that is refused leaves nothing behind."""
        return await evms.create(request)

    @router.get("/{name}")
    async def show_evm(name: str) -> Evm:
        return evms.get(name)

    @router.get("/{name}/network")
    async def show_network(name: str) -> EvmNetwork:
        """Addresses that its guest took by itself, and what was counted at its taps, as its node last reported."""
        told = services.nodes.report_of(evms.get(name))
        return EvmNetwork(learnt=told.learnt, refused=told.asked, traffic=told.traffic) if told else EvmNetwork()

    @router.get("/{name}/clock")
    async def show_clock(name: str) -> GuestClock:
        """Its guest's wall clock, as its node found it when the guest last began to run there; empty until then."""
        told = services.nodes.report_of(evms.get(name))
        return (told.clock if told else None) or GuestClock()

    @router.post("/{name}/start")
    async def start_evm(name: str, request: EvmStart | None = None) -> Evm:
        """Cold start of an EVM that is stopped, crashed or panicked by its owner's word."""
        return await evms.start(name, request or EvmStart())

    @router.post("/{name}/recover")
    async def recover_evm(name: str, request: EvmStart | None = None) -> Evm:
        """Cold restart of an EVM whose node is lost, or whose migration was: only once each node that could run it has
        given it up or is fenced. What is missing is said, with the command to run."""
        return await evms.recover(name, request or EvmStart())

    @router.post("/{name}/stop")
    async def stop_evm(name: str, request: EvmStop | None = None) -> Evm:
        return await evms.stop(name, request or EvmStop())

    @router.delete("/{name}", status_code=status.HTTP_204_NO_CONTENT)
    async def delete_evm(name: str, grace_s: Annotated[float | None, Query(ge=0, le=600)] = None) -> None:
        """Removes the EVM, its addresses and the volumes made with it; by default the guest is only given time to
        shut down where it has a volume that stays."""
        await evms.delete(name, grace_s=grace_s)

    @router.post("/{name}/volumes")
    async def attach_volume(name: str, request: VolumeAttach) -> Evm:
        """Gives it one more volume: plugged into an EVM that runs, there at the next start of one that is stopped."""
        return await evms.attach_volume(name, request.volume)

    @router.delete("/{name}/volumes/{volume}")
    async def detach_volume(name: str, volume: str, in_use: Annotated[bool, Query()] = False) -> Evm:
        """Takes a volume away. Refused while the guest is using it, unless ``in_use``: it then gets I/O errors."""
        return await evms.detach_volume(name, volume, in_use=in_use)

    @router.get("/{name}/console", response_class=StreamingResponse)
    async def read_console(name: str) -> StreamingResponse:
        """Bytes of the serial console for as long as the EVM lives, over its migrations."""
        output = await services.consoles.open(name)
        return StreamingResponse(output, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})

    @router.post("/{name}/console", status_code=status.HTTP_204_NO_CONTENT)
    async def type_at_console(name: str, request: Request) -> None:
        """Sends the body's bytes, at most 64 KiB, to the serial console."""
        await services.consoles.type(name, await request.body())

    return router
