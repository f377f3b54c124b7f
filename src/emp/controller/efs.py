"""The pool's EFS file systems, and what an EVM needs of them: which mount target it speaks to, and whether it may move.

There is no record of a file system: the cloud has it, and an EVM's own record names what it has mounted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from emp.controller.book import Book
from emp.migration.efs import choose
from emp.model.efs import NO_EFS, EfsFacts, EfsMount, FileSystem, parse_mount
from emp.model.errors import BadInput, Conflict, NotFound, Refused, Unavailable
from emp.model.evm import EvmSpec
from emp.volumes.base import EfsDriver


@dataclass(frozen=True)
class AskedMount:
    """What was asked for, and the field that it stood in."""

    file_system: str
    path: str
    field: str


class Efs:
    def __init__(self, book: Book, driver: EfsDriver | None) -> None:
        self._book = book
        self._driver = driver

    async def aclose(self) -> None:
        if self._driver is not None:
            await self._driver.aclose()

    # -------------------------------------------------------------- file systems

    async def list(self) -> tuple[FileSystem, ...]:
        return await self._need().list() if self._driver else ()

    async def get(self, file_system: str) -> FileSystem:
        """Raises ``NotFound``."""
        return await self._need().describe(file_system)

    async def create(self) -> FileSystem:
        return await self._need().create()

    async def delete(self, file_system: str) -> None:
        """Raises ``NotFound``, ``Refused``, or ``Conflict`` while an EVM has it mounted."""
        driver = self._need()
        await driver.describe(file_system)
        users = self.users(file_system)
        if users:
            hint = f"emp evm delete {users[0]} first"
            raise Conflict(f"{file_system} is mounted by EVM {', '.join(users)}", field="efs", hint=hint)
        await driver.delete(file_system)

    def users(self, file_system: str) -> tuple[str, ...]:
        """Return the EVMs that have it mounted."""
        return tuple(
            evm.spec.name for evm in self._book.evms.all() if file_system in {m.file_system for m in evm.spec.efs}
        )

    def _need(self) -> EfsDriver:
        if self._driver is None:
            hint = "give the controller an `efs` section (docs/efs.md); in a lab: emp lab up --cloud"
            raise Refused("this pool has no EFS", field="efs", hint=hint)
        return self._driver

    # -------------------------------------------------------------- mounts of EVMs

    async def check(self, texts: Sequence[str]) -> tuple[tuple[AskedMount, ...], EfsFacts]:
        """Read what an EVM is to mount, and ask the cloud. Raises ``BadInput``, ``NotFound``, ``Refused``."""
        asked: list[AskedMount] = []
        for index, text in enumerate(texts):
            field = f"efs[{index}]"
            file_system, path = parse_mount(text, field=field)
            if file_system in (other.file_system for other in asked):
                hint = "mount it once; its paths are below it"
                raise BadInput(f"{file_system} is named twice", field=field, hint=hint)
            asked.append(AskedMount(file_system, path, field))
        if not asked:
            return (), NO_EFS
        facts = await self._need().facts(each.file_system for each in asked)
        if facts.problem is not None:
            raise Unavailable(f"EFS could not be asked: {facts.problem}", field="efs", hint="try again")
        for each in asked:
            if facts.find(each.file_system) is None:
                hint = "see: emp volume list --efs, or the account's file systems"
                raise NotFound(f"there is no file system {each.file_system}", field=each.field, hint=hint)
        return tuple(asked), facts

    def mounts(self, asked: Iterable[AskedMount], facts: EfsFacts, node: str) -> tuple[EfsMount, ...]:
        """Choose the mount targets for an EVM that is made on ``node``. Raises ``Refused`` saying why there is none."""
        return tuple(self._mount(each, facts, node) for each in asked)

    def _mount(self, asked: AskedMount, facts: EfsFacts, node: str) -> EfsMount:
        found = facts.find(asked.file_system)
        assert found is not None  # ``check`` has seen to it
        chosen = choose(found, facts, node)
        if isinstance(chosen, str):
            raise Refused(f"{node} does not reach {found.id}: {chosen}", field=asked.field)
        return EfsMount(file_system=found.id, path=asked.path, address=chosen.address)

    async def facts(self, spec: EvmSpec) -> EfsFacts:
        """Return what pre-flight looks at before ``spec`` moves."""
        if not spec.efs:
            return NO_EFS
        if self._driver is None:
            return EfsFacts(problem="the controller's configuration has no efs section any more: put it back")
        return await self._driver.facts(mount.file_system for mount in spec.efs)
