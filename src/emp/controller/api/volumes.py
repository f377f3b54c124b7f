"""Volumes: create, list, show, resize, delete."""

from __future__ import annotations

from fastapi import APIRouter, status

from emp.controller.services import Services
from emp.controller.volumes import check_size
from emp.model.api import Listing, VolumeCreate, VolumeResize
from emp.model.errors import BadInput
from emp.model.volume import Volume, VolumeType


def router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1/volumes", tags=["volumes"])
    volumes = services.volumes

    @router.get("")
    async def list_volumes() -> Listing[Volume]:
        return Listing[Volume](items=volumes.all(), revision=services.book.revision)

    @router.post("", status_code=status.HTTP_201_CREATED)
    async def create_volume(request: VolumeCreate) -> Volume:
        if request.type is VolumeType.SHARED:
            if request.url is None:
                raise BadInput("shared storage is named by its URL", field="url", hint="nbds://HOST/EXPORT or rbd:...")
            if request.image is not None:
                raise BadInput("shared storage has its contents already", field="image", hint="leave it out")
            return volumes.shown(await volumes.register(request.url, request.size_bytes))
        if request.url is not None:
            raise BadInput(f"a volume of the type {request.type} has no URL", field="url", hint="the type is shared")
        if request.size_bytes is None:
            raise BadInput("a volume to be made needs a size", field="size_bytes", hint="such as 1GiB")
        size_bytes = check_size(request.size_bytes, field="size_bytes")
        return volumes.shown(await volumes.create(request.type, size_bytes, image=request.image))

    @router.get("/{id}")
    async def show_volume(id: str) -> Volume:  # noqa: A002
        return await volumes.show(id)

    @router.delete("/{id}", status_code=status.HTTP_204_NO_CONTENT)
    async def delete_volume(id: str) -> None:  # noqa: A002
        await volumes.delete(id)

    @router.post("/{id}/resize")
    async def resize_volume(id: str, request: VolumeResize) -> Volume:  # noqa: A002
        """Makes it bigger; the guest of an EVM that runs sees the new size."""
        size_bytes = check_size(request.size_bytes, field="size_bytes")
        return volumes.shown(await services.evms.resize_volume(id, size_bytes))

    return router
