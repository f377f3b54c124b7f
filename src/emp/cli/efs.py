"""The EFS side of ``emp volume``: file systems are made and removed like volumes, and are attached to nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emp.cli.output import print_facts, print_json, print_table
from emp.cli.session import Session

if TYPE_CHECKING:
    from emp.model.efs import FileSystem

KIND = "efs"
PREFIX = "fs-"


def create(session: Session, *, as_json: bool) -> None:
    with session.client() as client:
        made = client.efs.create()
    if as_json:
        print_json(made)
        return
    print(f"file system {made.id} is made; mount it with: emp evm create NAME --efs {made.id}")


def list_(session: Session, *, as_json: bool) -> None:
    with session.client() as client:
        found = client.efs.list()
    if as_json:
        print_json(found)
        return
    rows = [(each.id, each.state, " ".join(target.address for target in each.targets) or "-") for each in found.items]
    print_table(
        ("FILE SYSTEM", "STATE", "MOUNT TARGETS"), rows, empty="There is none; emp volume create efs makes one."
    )


def show(session: Session, id: str, *, as_json: bool) -> None:  # noqa: A002
    with session.client() as client:
        found = client.efs.get(id)
    if as_json:
        print_json(found)
    else:
        print_facts([("file system", found.id), ("state", found.state), ("mount targets", "\n".join(_targets(found)))])


def delete(session: Session, id: str, *, as_json: bool) -> None:  # noqa: A002
    with session.client() as client:
        client.efs.delete(id)
    if as_json:
        print_json({"deleted": id})
    else:
        print(f"file system {id} is deleted, and all that was in it")


def _targets(found: FileSystem) -> list[str]:
    return [f"{target.address}  {target.zone}  {target.state}" for target in found.targets] or ["none"]
