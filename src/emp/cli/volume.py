"""``emp volume``: volumes that EVMs can be given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from emp.cli import efs
from emp.cli.output import clock, milliseconds, print_facts, print_json, print_table, seconds, size
from emp.cli.session import Json, Session
from emp.model.errors import BadInput, Conflict

if TYPE_CHECKING:
    from emp.model.volume import Attachment, Handover, Volume

app = typer.Typer(help="Volumes that EVMs can be given.", no_args_is_help=True, add_completion=False)

Id = Annotated[str, typer.Argument(metavar="ID", help="Id of the volume.")]


@app.command()
def create(
    ctx: typer.Context,
    what: Annotated[str, typer.Argument(metavar="TYPE:SIZE|shared|efs", help="Such as io2:1GiB; shared with --url.")],
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Of storage that every node reaches: nbds://... or rbd:...")
    ] = None,
    wanted: Annotated[
        str | None, typer.Option("--size", metavar="SIZE", help="Of shared storage; left out, it is read if it can be.")
    ] = None,
    image: Annotated[
        str | None, typer.Option("--from-image", metavar="IMAGE", help="What is on it; left out, zeros.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a volume, or name shared storage; an EVM gets it by emp evm create --volume ID."""
    from emp.model.names import parse_size

    session: Session = ctx.obj
    if what == efs.KIND:
        efs.create(session, as_json=as_json)
        return
    kind, colon, amount = what.partition(":")
    if what == "shared":
        if url is None:
            raise BadInput(
                "shared storage is named by its URL", field="url", hint="--url nbds://HOST/EXPORT or rbd:..."
            )
        size_bytes = None if wanted is None else parse_size(wanted, field="size")
        with session.client() as client:
            volume = client.volumes.register(url, size=size_bytes)
    else:
        if url is not None or wanted is not None:
            field = "url" if url is not None else "size"
            raise BadInput("only shared storage takes it", field=field, hint="emp volume create shared --url URL")
        if not colon:
            raise BadInput(f"{what[:40]!r} is not a type and a size", field="TYPE:SIZE", hint="like io2:1GiB")
        size_bytes = parse_size(amount, field="size")
        with session.client() as client:
            volume = client.volumes.create(size_bytes, type=kind, image=image)
    if as_json:
        print_json(volume)
    else:
        verb = "known" if volume.url else "made"
        print(f"volume {volume.id} is {verb}: {volume.type}, {size(volume.size_bytes)}")


@app.command(name="list")
def list_(
    ctx: typer.Context,
    of_efs: Annotated[bool, typer.Option("--efs", help="EFS file systems that this pool has made.")] = False,
    as_json: Json = False,
) -> None:
    """Show every volume."""
    session: Session = ctx.obj
    if of_efs:
        efs.list_(session, as_json=as_json)
        return
    with session.client() as client:
        volumes = client.volumes.list()
    if as_json:
        print_json(volumes)
        return
    rows = [
        (v.id, v.type.value, size(v.size_bytes), v.state or "-", v.evm or "-", _nodes(v) or "-") for v in volumes.items
    ]
    print_table(("VOLUME", "TYPE", "SIZE", "STATE", "EVM", "ATTACHED TO"), rows, empty="There is no volume.")


@app.command()
def show(ctx: typer.Context, id: Id, as_json: Json = False) -> None:  # noqa: A002
    """Show one volume: how it is, where it is attached, how it last went over with its EVM."""
    session: Session = ctx.obj
    if id.startswith(efs.PREFIX):
        efs.show(session, id, as_json=as_json)
        return
    with session.client() as client:
        volume = client.volumes.get(id)
    if as_json:
        print_json(volume)
        return
    print_facts(
        [
            ("volume", volume.id),
            ("type", volume.type.value),
            ("size", size(volume.size_bytes)),
            ("serial", volume.serial),
            ("made from", volume.image),
            ("driver", volume.driver),
            ("url", volume.url),
            ("state", f"{volume.state or 'unknown'}{f': {volume.fault}' if volume.fault else ''}"),
            ("evm", volume.evm or "none"),
            ("attached", "\n".join(map(_attached, volume.attachments)) or "to no node"),
            ("last move", _handover(volume.handover) if volume.handover else None),
        ]
    )


@app.command()
def delete(ctx: typer.Context, id: Id, as_json: Json = False) -> None:  # noqa: A002
    """Delete a volume that no EVM has, and what is on it."""
    session: Session = ctx.obj
    if id.startswith(efs.PREFIX):
        efs.delete(session, id, as_json=as_json)
        return
    with session.client() as client:
        client.volumes.delete(id)
    if as_json:
        print_json({"deleted": id})
    else:
        print(f"volume {id} is deleted")


@app.command()
def attach(
    ctx: typer.Context,
    id: Id,  # noqa: A002
    evm: Annotated[str, typer.Argument(metavar="EVM", help="Name of the EVM.")],
    as_json: Json = False,
) -> None:
    """Give a volume to an EVM: plugged if it runs, else there at its next start."""
    session: Session = ctx.obj
    with session.client() as client:
        record = client.evms.attach_volume(evm, id)
    if as_json:
        print_json(record)
        return
    slot = record.spec.slots[record.spec.volumes.index(id)]
    print(f"EVM {evm} has volume {id}, its disk 0:0:0:{slot}")


@app.command()
def detach(
    ctx: typer.Context,
    id: Id,  # noqa: A002
    in_use: Annotated[
        bool, typer.Option("--in-use", help="Also if the guest is using it: it gets I/O errors.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Take a volume away from its EVM; what is on it stays. Unmount it in the guest first."""
    session: Session = ctx.obj
    with session.client() as client:
        owner = client.volumes.get(id).evm
        if owner is None:
            raise Conflict(f"volume {id} belongs to no EVM", field="volume", hint=f"see: emp volume show {id}")
        record = client.evms.detach_volume(owner, id, in_use=in_use)
    if as_json:
        print_json(record)
    else:
        print(f"EVM {owner} has volume {id} no longer")


@app.command()
def resize(
    ctx: typer.Context,
    id: Id,  # noqa: A002
    to: Annotated[str, typer.Argument(metavar="SIZE", help="The new size, such as 2GiB. Volumes only grow.")],
    as_json: Json = False,
) -> None:
    """Make a volume bigger; the guest of an EVM that runs sees it at once."""
    from emp.model.names import parse_size

    session: Session = ctx.obj
    size_bytes = parse_size(to, field="size")
    with session.client() as client:
        volume = client.volumes.resize(id, size_bytes)
    if as_json:
        print_json(volume)
    else:
        print(f"volume {id} has {size(volume.size_bytes)}")


def _nodes(volume: Volume) -> str:
    return " ".join(dict.fromkeys(attachment.node for attachment in volume.attachments))


def _attached(attachment: Attachment) -> str:
    claimed = f", claimed under {attachment.claimed}" if attachment.claimed > attachment.epoch else ""
    return f"{attachment.node} (epoch {attachment.epoch}{claimed})"


def _handover(move: Handover) -> str:
    """Return lines: what moved and when, what it cost, and what is wrong."""
    end = "broken off" if move.broken_off else "done"
    when = f"{end} {clock(move.ended_at)}" if move.ended_at else f"under way since {clock(move.began_at)}"
    lines = [f"{move.source} -> {move.target} by {move.order}, {when} ({move.migration})"]
    figures = [
        f"{name} {text}"
        for name, value, text in (
            ("I/O stall", move.io_stall_ms, milliseconds(move.io_stall_ms)),
            ("detach", move.detach_ms, milliseconds(move.detach_ms)),
            ("attach", move.attach_ms, milliseconds(move.attach_ms)),
            ("relayed since", None if move.ended_at else move.relayed_since, clock(move.relayed_since or 0)),
            ("relayed for", move.relayed_s, seconds(move.relayed_s)),
            ("relayed", move.relayed_bytes, size(move.relayed_bytes)),
        )
        if value is not None
    ]
    lines += [", ".join(figures)] if figures else []
    if move.alarm is not None:
        lines.append(f"ALARM after {move.tries} {'try' if move.tries == 1 else 'tries'}: {move.alarm}")
    return "\n".join(lines)
