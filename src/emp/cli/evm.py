"""``emp evm``: elastic VMs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from emp.cli.output import clock, print_facts, print_json, print_table, size
from emp.cli.session import Json, Session
from emp.cli.values import parse_duration_s
from emp.model.errors import BadInput

if TYPE_CHECKING:
    from emp.model.evm import Evm, Nic, Pod
    from emp.model.network import Traffic

app = typer.Typer(help="EVMs: elastic VMs.", no_args_is_help=True, add_completion=False)

Name = Annotated[str, typer.Argument(metavar="EVM", help="Name of the EVM.")]
Grace = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Time that the guest gets after the power button; 0: power off at once."),
]


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new EVM.")],
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Such as 512MiB.")] = "512MiB",
    vcpus: Annotated[int, typer.Option(help="Number of virtual CPUs.")] = 1,
    image: Annotated[str, typer.Option(help="What it boots.")] = "micro",
    node: Annotated[str | None, typer.Option(help="Where; left out, placement picks.")] = None,
    pod: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=ADDRESS[,ADDRESS]]",
            help="A pod in it, with a MAC and addresses of its own: one of IPv4 (left out, one is chosen), one of "
            "IPv6 or auto (left out, none).",
        ),
    ] = None,
    nic: Annotated[list[str] | None, typer.Option(metavar="auto", help="One more NIC, its address chosen.")] = None,
    ipv6: Annotated[
        list[str] | None, typer.Option(metavar="auto|ADDRESS", help="An IPv6 address of the first NIC, then the next.")
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(metavar="TYPE:SIZE|ID", help="The disk that it boots from: made from the image, or one that is."),
    ] = None,
    volume: Annotated[
        list[str] | None, typer.Option(metavar="TYPE:SIZE|ID", help="A volume: a new one, or one that is there.")
    ] = None,
    efs: Annotated[
        list[str] | None,
        typer.Option(metavar="ID[:PATH]", help="An EFS file system, mounted at /efs/ID in the guest."),
    ] = None,
    restart: Annotated[str | None, typer.Option(help="never, on-failure (default) or always.")] = None,
    cpu: Annotated[str | None, typer.Option(metavar="MODEL", help="CPU model; left out, one that all have.")] = None,
    as_json: Json = False,
) -> None:
    """Make an EVM and boot it. --pod, --nic, --ipv6, --volume and --efs may be given several times."""
    from emp.model.names import parse_size

    session: Session = ctx.obj
    for given in nic or ():
        if given != "auto":
            hint = "write --nic auto; emp evm show says which address it got"
            raise BadInput(f"{given[:40]!r}: the pool chooses the address of a NIC", field="nic", hint=hint)
    request = {
        "name": name,
        "memory_bytes": parse_size(memory, field="memory"),
        "vcpus": vcpus,
        "image": image,
        "nics": 1 + len(nic or ()),
        "pods": pod or [],
        "volumes": volume or [],
    }
    more = {"node": node, "root": root, "efs": efs, "restart": restart, "cpu_model": cpu, "ipv6": ipv6}
    request |= {key: value for key, value in more.items() if value}
    with session.client() as client:
        evm = client.evms.create(request)
    if as_json:
        print_json(evm)
        return
    print(f"EVM {evm.spec.name} runs on {evm.owner}")
    _print_addresses(evm)


@app.command(name="list")
def list_(ctx: typer.Context, as_json: Json = False) -> None:
    """Show every EVM."""
    session: Session = ctx.obj
    with session.client() as client:
        evms = client.evms.list()
    if as_json:
        print_json(evms)
        return
    rows = [
        (
            evm.spec.name,
            evm.state.value,
            evm.owner or "-",
            evm.spec.nics[0].address,
            size(evm.spec.memory_bytes),
            str(evm.spec.vcpus),
            str(len(evm.spec.pods)),
            str(len(evm.spec.volumes)),
        )
        for evm in evms.items
    ]
    headers = ("EVM", "STATE", "NODE", "ADDRESS", "MEMORY", "VCPUS", "PODS", "VOLUMES")
    print_table(headers, rows, empty="There is no EVM; emp evm create makes one.")


@app.command()
def show(ctx: typer.Context, name: Name, as_json: Json = False) -> None:
    """Show one EVM: where it runs, how it is, what it is made of."""
    session: Session = ctx.obj
    with session.client() as client:
        evm, network, guest_clock = client.evms.get(name), client.evms.network(name), client.evms.clock(name)
    if as_json:
        beside = {"network": network.model_dump(mode="json"), "clock": guest_clock.model_dump(mode="json")}
        print_json(evm.model_dump(mode="json") | beside)
        return
    spec = evm.spec
    print_facts(
        [
            ("evm", spec.name),
            ("state", f"{evm.state}{f': {evm.reason}' if evm.reason else ''}"),
            ("node", f"{evm.owner} (epoch {evm.epoch})" if evm.owner else "none"),
            ("migration", evm.migration),
            ("memory", size(spec.memory_bytes)),
            ("vcpus", str(spec.vcpus)),
            ("image", f"{spec.image} ({spec.image_digest.removeprefix('sha256:')[:12]})"),
            ("machine", f"{spec.machine}, {spec.cpu_model}"),
            ("nics", "\n".join(f"{_addressed(nic)}  {nic.mac}" for nic in spec.nics)),
            ("pods", "\n".join(f"{_addressed(pod)}  {pod.mac}  {pod.name}" for pod in spec.pods)),
            ("learnt", "\n".join(f"{one.address}  {one.mac}" for one in network.learnt)),
            ("refused", "\n".join(f"{one.address}  {one.mac}  not this EVM's to use" for one in network.refused)),
            ("traffic", _traffic(network.traffic) if network.traffic else None),
            ("clock", "\n".join(guest_clock.in_words) if evm.owner else None),
            ("volumes", "\n".join(spec.volumes)),
            ("efs", "\n".join(f"{m.file_system}:{m.path} at {m.mount_point}, from {m.address}" for m in spec.efs)),
            ("restart", spec.restart.value),
            ("made", clock(evm.created_at)),
        ]
    )


def _addressed(each: Nic | Pod) -> str:
    six = f"  {each.ipv6.address}/{each.ipv6.prefix_length}" if each.ipv6 is not None else ""
    return f"{each.address}/{each.prefix_length}{six}"


@app.command()
def start(
    ctx: typer.Context,
    name: Name,
    node: Annotated[str | None, typer.Option(help="Where; left out, where it was if that fits.")] = None,
    as_json: Json = False,
) -> None:
    """Boot an EVM that is stopped, crashed or panicked."""
    session: Session = ctx.obj
    with session.client() as client:
        evm = client.evms.start(name, node=node)
    _print(evm, f"EVM {evm.spec.name} runs on {evm.owner}", as_json)


@app.command()
def recover(
    ctx: typer.Context,
    name: Name,
    node: Annotated[str | None, typer.Option(help="Where; left out, where it was if that fits.")] = None,
    as_json: Json = False,
) -> None:
    """Boot an EVM whose node, or whose migration, is lost. Says which node must be fenced first."""
    session: Session = ctx.obj
    with session.client() as client:
        evm = client.evms.recover(name, node=node)
    _print(evm, f"EVM {evm.spec.name} runs on {evm.owner}", as_json)


@app.command()
def stop(ctx: typer.Context, name: Name, grace: Grace = None, as_json: Json = False) -> None:
    """Shut an EVM down, and keep it down."""
    session: Session = ctx.obj
    with session.client() as client:
        evm = client.evms.stop(name, grace_s=_grace_s(grace))
    _print(evm, f"EVM {evm.spec.name} is {evm.state}{f': {evm.reason}' if evm.reason else ''}", as_json)


@app.command()
def delete(ctx: typer.Context, name: Name, grace: Grace = None, as_json: Json = False) -> None:
    """Remove an EVM, its addresses, and the volumes that were made with it."""
    session: Session = ctx.obj
    with session.client() as client:
        client.evms.delete(name, grace_s=_grace_s(grace))
    if as_json:
        print_json({"deleted": name})
    else:
        print(f"EVM {name} is deleted")


@app.command()
def console(
    ctx: typer.Context,
    name: Name,
    duration: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="Detach after so long, such as 5s.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Attach to the serial console; Ctrl-] detaches. Stays attached while the EVM migrates.

    Where stdin is not a terminal it is sent as it is, and output is printed until --for is over or the EVM is stopped.
    """
    from emp.cli.console import attach

    session: Session = ctx.obj
    attach(session, name, for_s=None if duration is None else parse_duration_s(duration, field="for"), as_json=as_json)


def _traffic(counted: Traffic) -> str:
    lines = [
        f"received {counted.received_frames} frames, {size(counted.received_bytes)}",
        f"sent {counted.sent_frames} frames, {size(counted.sent_bytes)}",
    ]
    if counted.dropped_frames:
        lines.append(f"dropped {counted.dropped_frames} frames that the guest did not take in time")
    if counted.spoofed_frames:
        lines.append(f"dropped {counted.spoofed_frames} frames that the guest sent in another's name")
    return "\n".join(lines)


def _grace_s(text: str | None) -> float | None:
    return None if text is None else parse_duration_s(text, field="grace")


def _print(evm: Evm, text: str, as_json: bool) -> None:
    if as_json:
        print_json(evm)
    else:
        print(text)


def _ips(each: Nic | Pod) -> str:
    return "  ".join([each.address, *([each.ipv6.address] if each.ipv6 is not None else [])])


def _print_addresses(evm: Evm) -> None:
    print_facts(
        [
            ("  address", "\n".join(_ips(nic) for nic in evm.spec.nics)),
            ("  pods", "\n".join(f"{_ips(pod)}  {pod.name}" for pod in evm.spec.pods)),
            ("  volumes", "\n".join(evm.spec.volumes)),
        ]
    )
