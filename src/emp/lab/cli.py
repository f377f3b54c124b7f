"""``emp lab``: a whole pool on this machine, to try it, to test it, and to break it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from emp.cli.output import print_json, print_table
from emp.cli.session import Json, Session
from emp.lab import partition, verbs
from emp.lab import power as power_switch
from emp.lab.down import down as clear_lab
from emp.lab.preflight import become_root
from emp.lab.region import Profile, instance_of, zone_of
from emp.lab.state import LabFiles, LabState, chosen, lab_names
from emp.lab.topology import Network
from emp.lab.up import Options, broken_parts
from emp.lab.up import up as make_lab
from emp.model.errors import BadInput, NotFound
from emp.model.names import format_size, parse_size

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="A whole pool on this machine: real daemons, real EVMs, in namespaces.",
)

DEFAULT_NAME = "lab"

Name = Annotated[str | None, typer.Option("--name", help="Which lab; needed only where there are several.")]
Where = Annotated[str, typer.Argument(help="A node (n1, n2, ...), ctl, vol, bmc or client.")]
Role = Annotated[str, typer.Argument(help="agent, controller, volumes, power, or qemu:EVM.")]


@app.callback()
def _as_root() -> None:
    if "--help" not in sys.argv:
        become_root()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _terminated)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Unwind as for Ctrl-C, so that nothing half made is left."""
    sys.exit(128 + number)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield a way to say what is being done: a moving line at a terminal, else a line each."""
    if not sys.stderr.isatty():
        yield lambda line: print(line, file=sys.stderr, flush=True)
        return
    from rich.console import Console

    with Console(stderr=True, highlight=False).status("making a lab") as moving:
        yield moving.update


def _lab(ctx: typer.Context, name: str | None) -> LabFiles:
    session: Session = ctx.obj
    return chosen(name or session.context)


@app.command()
def up(
    name: Annotated[str, typer.Option("--name", help="Of the lab, of its pool and its context.")] = DEFAULT_NAME,
    nodes: Annotated[int, typer.Option(help="Number of bare-metal nodes.")] = 2,
    port: Annotated[int | None, typer.Option(help="Of the controller; the first free one if left out.")] = None,
    memory: Annotated[str, typer.Option(help="That each node offers to EVMs.")] = "4GiB",
    vcpus: Annotated[int, typer.Option(min=1, help="That each node offers to EVMs.")] = 8,
    keep: Annotated[bool, typer.Option("--keep/--no-keep", help="Start a daemon that ends again, after 1 s.")] = False,
    cloud: Annotated[Profile | None, typer.Option(help="Volumes from a simulated cloud, as slow as said.")] = None,
    network: Annotated[Network, typer.Option(help="How addresses reach their EVMs; vpc has a cloud.")] = Network.L2,
    remap: Annotated[float, typer.Option(min=0, help="Seconds that a vpc takes to move an address.")] = 0.0,
    image: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A guest image beside micro: debian.")] = None,
    zone_of: Annotated[list[str] | None, typer.Option(hidden=True, metavar="NODE=LETTER")] = None,
    as_json: Json = False,
) -> None:
    """Make a lab; when this returns, its pool can be used."""
    zones = dict(_zone(text) for text in zone_of or ())
    options = Options(
        name,
        nodes,
        port,
        parse_size(memory, field="memory"),
        vcpus,
        keep=keep,
        cloud=cloud,
        network=network,
        remap_s=remap,
        zones=zones,
        images=tuple(image or ()),
    )
    with _progress() as say:
        state = make_lab(options, say)
    if as_json:
        print_json(_summary(name) | {"context": name, "places": _places(LabFiles(name))})
        return
    nodes_text = ", ".join(place.name for place in state.topology.node_places)
    print(f"The lab {name} is up. Nodes: {nodes_text}, each {format_size(options.memory_bytes)} and {vcpus} vCPUs.")
    print(f"  emp --context {name} evm create web")
    print(f"  emp --context {name} migrate web")
    print(f"  emp lab down --name {name}")


def _zone(text: str) -> tuple[str, str]:
    node, _, letter = text.partition("=")
    return node, letter


@app.command()
def down(ctx: typer.Context, name: Name = None, as_json: Json = False) -> None:
    """Remove a lab and every trace of it, whatever state it is in."""
    gone = False
    with suppress(NotFound):  # no lab at all: there is nothing to remove, which is what was asked for
        files = _lab(ctx, name)
        name, gone = files.name, clear_lab(files)
    if as_json:
        print_json({"name": name, "removed": gone})
    else:
        print(f"The lab {name} is gone." if gone else "There is no such lab: nothing to remove.")


@app.command(name="list")
def list_(as_json: Json = False) -> None:
    """Show the labs on this machine."""
    labs = [_summary(name) for name in lab_names()]
    if as_json:
        print_json({"items": labs})
        return
    rows = [(lab["name"], str(lab["nodes"] or "-"), lab["url"] or "-", lab["state"]) for lab in labs]
    print_table(("LAB", "NODES", "URL", "STATE"), rows, empty="There is no lab on this machine: emp lab up makes one.")


def _summary(name: str) -> dict[str, Any]:
    files = LabFiles(name)
    try:
        state = files.load()
    except NotFound:
        health = {"state": "half made", "dead": []}
        return {"name": name, "nodes": None, "url": None} | health | {"cloud": None, "network": None}
    dead = broken_parts(files, state)
    url = f"https://127.0.0.1:{state.port}"
    health = {"state": "broken" if dead else "up", "dead": dead}
    kind = {"cloud": _cloud(state), "network": state.network}
    return {"name": name, "nodes": state.nodes, "url": url} | health | kind


def _cloud(state: LabState) -> dict[str, Any] | None:
    """Return the lab's cloud: its latencies, and which instance in which zone each node is. None: it has none."""
    if state.cloud is None:
        return None
    instances = {
        place.name: {"instance": instance_of(place), "zone": zone_of(state, place)}
        for place in state.topology.node_places
    }
    return {"latency": state.cloud, "instances": instances}


def _places(files: LabFiles) -> list[dict[str, Any]]:
    return [asdict(place) for place in verbs.status(files)]


@app.command()
def status(ctx: typer.Context, name: Name = None, as_json: Json = False) -> None:
    """Show what runs in each place of a lab."""
    files = _lab(ctx, name)
    places = verbs.status(files)
    summary = _summary(files.name)
    cuts = partition.cuts(files.load().topology)
    if as_json:
        parts = {"places": [asdict(place) for place in places], "cuts": [asdict(one) for one in cuts]}
        print_json(summary | {"directory": str(files.directory)} | parts)
        return
    print(f"lab {files.name}, {summary['url']}: {summary['state']}")
    rows = [
        (
            place.name,
            place.address,
            place.role,
            place.state,
            str(place.pid or "-"),
            "-" if place.restarts is None else str(place.restarts),
            " ".join(place.evms) or "-",
        )
        for place in places
    ]
    print_table(("PLACE", "ADDRESS", "DAEMON", "STATE", "PID", "RESTARTS", "EVMS"), rows, empty="It has no places.")
    if summary["network"] == Network.VPC:
        print("addresses are of network interfaces of the cloud, which routes to them")
    if cloud := summary["cloud"]:
        print(f"volumes are of a simulated cloud; latencies: {cloud['latency']}")
        for node, there in cloud["instances"].items():
            print(f"  {node} is {there['instance']} in {there['zone']}")
    for one in cuts:
        print(f"cut: {one.source} -> {one.target} ({one.how})")
    print(f"logs are in {files.directory / 'logs'}")


@app.command(name="exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def exec_(
    ctx: typer.Context,
    where: Where,
    command: Annotated[list[str], typer.Argument(help="Command, after --.")],
    name: Name = None,
) -> None:
    """Run a command in a place, as root: emp lab exec n1 -- ip address"""
    verbs.execute(_lab(ctx, name), where, command[1:] if command[:1] == ["--"] else command)


@app.command()
def kill(
    ctx: typer.Context,
    where: Where,
    role: Role,
    restart: Annotated[bool, typer.Option("--restart", help="Let the lab's keeper start it again.")] = False,
    name: Name = None,
) -> None:
    """Kill a daemon or an EVM's QEMU (SIGKILL); a daemon stays dead until it is started."""
    pid = verbs.kill(_lab(ctx, name), where, role, restart=restart)
    print(f"{role} on {where} (pid {pid}) is dead" + (", and is started again" if restart else ""))


@app.command()
def stop(ctx: typer.Context, where: Where, role: Role, name: Name = None) -> None:
    """Freeze a daemon or an EVM's QEMU (SIGSTOP)."""
    print(f"{role} on {where} (pid {verbs.stop(_lab(ctx, name), where, role)}) is frozen")


@app.command()
def cont(ctx: typer.Context, where: Where, role: Role, name: Name = None) -> None:
    """Let what was frozen go on (SIGCONT)."""
    print(f"{role} on {where} (pid {verbs.cont(_lab(ctx, name), where, role)}) goes on")


@app.command()
def start(ctx: typer.Context, where: Where, role: Role, name: Name = None) -> None:
    """Start again a daemon that has died."""
    verbs.start(_lab(ctx, name), where, role)
    print(f"{role} on {where} is started")


@app.command()
def cut(
    ctx: typer.Context,
    one: Where,
    other: Where,
    one_way: Annotated[bool, typer.Option("--one-way", help="Only what ONE sends to OTHER.")] = False,
    reject: Annotated[bool, typer.Option("--reject", help="Answer TCP with a reset; else it is dropped.")] = False,
    name: Name = None,
) -> None:
    """Cut the network between two places; frames of EVMs pass."""
    how = partition.How.REJECT if reject else partition.How.DROP
    partition.cut(_lab(ctx, name), one, other, one_way=one_way, how=how)
    print(f"{one} {'->' if one_way else '<->'} {other}: {how}")


@app.command()
def heal(
    ctx: typer.Context,
    one: Annotated[str | None, typer.Argument(help="A place; without places every cut is mended.")] = None,
    other: Annotated[str | None, typer.Argument(help="The other place.")] = None,
    name: Name = None,
) -> None:
    """Mend the network between two places, or everywhere."""
    if (one is None) != (other is None):
        raise BadInput("one place alone is no wire", field="other", hint="name two places, or none for every cut")
    partition.heal(_lab(ctx, name), one, other)
    print(f"{one} <-> {other}: mended" if one else "every cut is mended")


@app.command()
def power(
    ctx: typer.Context,
    node: Annotated[str, typer.Argument(help="A node: n1, n2, ...")],
    state: Annotated[power_switch.Power, typer.Argument(help="What it is to be.")],
    name: Name = None,
) -> None:
    """Pull a node's plug, or boot it again with its disk as it was."""
    power_switch.switch(_lab(ctx, name), node, state)
    print(f"{node} is {state}")


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result to FILE.")] = None,
    name: Annotated[str, typer.Option("--name", help="Of the lab that it makes.")] = "demo",
) -> None:
    """Migrate an EVM there and back in a lab of its own, and show what happened."""
    from emp.lab.demo import run

    raise typer.Exit(0 if run(output, name=name) else 1)
