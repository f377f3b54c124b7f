"""EFS file systems: create, list, show, delete. EVMs are given them when they are made."""

from __future__ import annotations

from fastapi import APIRouter, status

from emp.controller.services import Services
from emp.model.api import Listing
from emp.model.efs import FileSystem


def router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1/efs", tags=["efs"])
    efs = services.efs

    @router.get("")
    async def list_file_systems() -> Listing[FileSystem]:
        return Listing[FileSystem](items=await efs.list(), revision=services.book.revision)

    @router.post("", status_code=status.HTTP_201_CREATED)
    async def create_file_system() -> FileSystem:
        return await efs.create()

    @router.get("/{id}")
    async def show_file_system(id: str) -> FileSystem:  # noqa: A002
        return await efs.get(id)

    @router.delete("/{id}", status_code=status.HTTP_204_NO_CONTENT)
    async def delete_file_system(id: str) -> None:  # noqa: A002
        await efs.delete(id)

    return router
