"""Where the driver of shared storage keeps what it has been told: in the pool's own store, as there is no service."""

from __future__ import annotations

from collections.abc import Callable

from emp.controller.book import Book, Edit
from emp.model.volume import Volume


class SharedRecords:
    def __init__(self, book: Book) -> None:
        self._book = book

    def all(self) -> list[Volume]:
        return self._book.shared.all()

    def find(self, volume: str) -> Volume | None:
        return self._book.shared.find(volume)

    async def change(self, volume: str, update: Callable[[Volume | None], Volume | None]) -> None:
        await self._book.write(Edit(self._book.shared, volume, update))
