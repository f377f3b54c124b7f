"""One EVM of ``bench.network``, the loads that a case puts on it, and one migration under them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from bench.network_capture import TapCapture
from bench.network_figures import BULK, CONNECTIONS, ECHO, ONE_WAY, PODS, PROBE_HZ, Case, Run, Stream
from emp import faults
from emp.client import Client
from emp.lab.checkers import frames, owners
from emp.lab.checkers.frames import FrameWitness
from emp.lab.guest_control import Guest
from emp.lab.probing import ClientProgram, Probing, window
from emp.lab.state import LabFiles, LabState
from emp.model.addresses import AddressMove
from emp.model.api import EvmCreate
from emp.model.errors import HostError
from emp.model.migration import Migration, Outcome
from emp.network.tap_driver import interface_name

NODES = ("n1", "n2")
MEMORY_BYTES = 512 << 20
REST_S = 2.0
"""at rest, before the migration, under the same load"""
SETTLE_S = 1.5
"""after a migration: what comes late or twice counts as its own, and each pod is asked several times"""
RECEIVED_S = 2.0
_EVM = "evm"
_REST, _MOVE, _AFTER = "at-rest", "migration", "after"


@dataclass
class Moved:
    """A migration, and what the wire showed of it."""

    migration: Migration
    emulator_ms: float | None
    violations: tuple[str, ...]
    dropped: int

    def run(self, rate_hz: int, stream: Stream, at_rest: Stream, gap_ms: float, **figures: Any) -> Run:
        report = self.migration.report
        return Run(
            rate_hz=rate_hz,
            stream=stream,
            at_rest=at_rest,
            gap_ms=gap_ms,
            pause_ms=self.pause_ms,
            target_brownout_s=known(report.stages.target_brownout_s, "target_brownout_s"),
            violations=self.violations,
            capture_dropped=self.dropped,
            frames_held=report.frames_held,
            frames_forwarded=report.frames_forwarded,
            ipv6_gap_s=_ipv6_gap_s(report.addresses),
            emulator_ms=self.emulator_ms,
            **figures,
        )

    @property
    def pause_ms(self) -> float:
        return known(self.migration.report.vcpu_pause_ms, "vcpu_pause_ms")


@dataclass
class OneWay:
    """What the client says of a stream that it sent, and the guest that counted it."""

    rate_hz: int
    sent: dict[str, Any]
    counted: dict[str, Any]

    @property
    def stream(self) -> Stream:
        sent, counted = self.sent["sent"], self.counted
        return Stream(sent, sent - counted["received"], counted["duplicated"], counted["reordered"])

    def lost_at_ms(self, resumed_s: float) -> tuple[float, ...]:
        """Return when the first that were lost had been due, from the target's RESUME (Unix time) on.

        Where the client left sends out, those behind were due later than this says.
        """
        due_s = (self.sent["begun_at_s"] + number / self.rate_hz for number in self.counted["missing"])
        return tuple(round((at_s - resumed_s) * 1000, 2) for at_s in due_s)


@dataclass
class Subject:
    """An EVM with so many pods; it is created, and waited for, when it is first asked for."""

    state: LabState
    client: Client
    name: str
    pods: int = 0
    ipv6: bool = False
    """it has an IPv6 address, to which the client sends"""
    boot_s: float = field(default=0.0, init=False)
    """from the order until the EVM and each pod answers"""

    def __post_init__(self) -> None:
        began_s = time.monotonic()
        self._files = LabFiles(self.state.name)
        wishes = tuple(f"p{number}" for number in range(1, self.pods + 1))
        ipv6 = ("auto",) if self.ipv6 else ()
        create = EvmCreate(name=self.name, memory_bytes=MEMORY_BYTES, node=NODES[0], pods=wishes, ipv6=ipv6)
        spec = self.client.evms.create(create).spec
        own = spec.nics[0]
        self._address = own.ipv6.address if own.ipv6 else own.address
        self._pods = {pod.name: pod.address for pod in spec.pods}
        self._macs, self._addresses = zip(*spec.addresses, strict=True)
        self._guest = Guest(self.state.topology, self._address)
        for address in (self._address, *self._pods.values()):
            Guest(self.state.topology, address).wait_first_packet()
        self.boot_s = time.monotonic() - began_s
        self._streams = 0

    def run(self, case: Case, rate_hz: int) -> Run:
        """Migrate it once to the other node under the load of a case. Raises ``HostError`` if that fails."""
        how: dict[str, Callable[[Case, int], Run]] = {
            ECHO: self._echo,
            ONE_WAY: self._one_way,
            BULK: self._bulk,
            CONNECTIONS: self._connections,
            PODS: self._with_pods,
        }
        return how[case.kind](case, rate_hz)

    def at_rest(self, case: Case, rate_hz: int) -> Stream:
        """Return what becomes of a UDP stream without a migration."""
        if case.kind == ONE_WAY:
            return self._stream(rate_hz, lambda: time.sleep(REST_S)).stream
        with Probing(self._files, {_EVM: self._address}, rate_hz=rate_hz) as probing:
            probing.mark(_REST)
            time.sleep(REST_S)  # how long the control lasts
            probing.mark(_AFTER)
            return echoed(probing.stop(), _REST, _EVM)

    # -- loads

    def _echo(self, case: Case, rate_hz: int) -> Run:
        with self._probed(rate_hz) as (move, end):
            moved = move()
            report = end()
        return moved.run(rate_hz, **_probe_figures(report), **_tcp_probe(report))

    def _one_way(self, case: Case, rate_hz: int) -> Run:
        at_rest = self.at_rest(case, rate_hz)
        moves: list[Moved] = []

        streamed = self._stream(rate_hz, lambda: moves.append(self._move(split=False)))
        (moved,) = moves
        resumed_s = known(moved.migration.report.resumed_at_s, "resumed_at_s")
        # The guest's clock stands while the guest does. Its silence may be at another time: then this is too much.
        gap_ms = moved.pause_ms + streamed.counted["silence_ms"]
        late_ms, lost_at_ms = streamed.sent["worst_late_ms"], streamed.lost_at_ms(resumed_s)
        return moved.run(rate_hz, streamed.stream, at_rest, gap_ms, late_ms=late_ms, lost_at_ms=lost_at_ms)

    def _bulk(self, case: Case, rate_hz: int) -> Run:
        with ClientProgram(self._files, "emp.lab.loads", ["bulk", self._address]) as load:
            wrong = int(self._guest.ask("bulk")["wrong"])
            with self._probed(rate_hz, beside=load) as (move, end):
                moved = move()
                report = end()
            figures = next(each for each in load.stop()["windows"] if each["name"] == _MOVE)
        stall_ms = max(figures["up"]["stall_ms"], figures["down"]["stall_ms"])
        wrong = figures["wrong"] + int(self._guest.ask("bulk")["wrong"]) - wrong
        return moved.run(
            rate_hz,
            **_probe_figures(report),
            resets=figures["resets"] + report["targets"][_EVM]["tcp"]["resets"],
            stall_ms=stall_ms,
            wrong=wrong,
            bulk_bytes_per_s=tuple(figures[way]["bytes"] / figures[way]["seconds"] for way in ("up", "down")),
        )

    def _connections(self, case: Case, rate_hz: int) -> Run:
        words = ["connections", self._address, "--number", str(case.number)]
        with ClientProgram(self._files, "emp.lab.loads", words) as load:
            with self._probed(rate_hz, beside=load) as (move, end):
                moved = move()
                report = end()
            figures = next(each for each in load.stop()["windows"] if each["name"] == _MOVE)
        return moved.run(
            rate_hz,
            **_probe_figures(report),
            resets=figures["resets"] + report["targets"][_EVM]["tcp"]["resets"],
            stall_ms=figures["worst_ms"],
            unanswered=figures["unanswered"],
            wrong=figures["wrong"],
        )

    def _with_pods(self, case: Case, rate_hz: int) -> Run:
        """1 kHz to the EVM itself, and as much to its pods together.

        Each pod is asked by itself before that: a hundred ARP requests at once, each of them delivered to a hundred
        pods by the guest's own bridge, would keep the guest from everything else for a second.
        """
        for address in self._pods.values():
            Guest(self.state.topology, address).wait_first_packet()
        with (
            Probing(self._files, self._pods, rate_hz=rate_hz / case.number, udp_only=True) as pods,
            self._probed(rate_hz, beside=pods) as (move, end),
        ):
            moved = move()
            report, of_pods = end(), pods.stop()
        figures = _probe_figures(report)
        for stream, name in (("stream", _MOVE), ("at_rest", _REST)):
            figures[stream] = _sum([figures[stream], echoed(of_pods, name, *self._pods)])
        silent = [pod for pod in self._pods if not window(of_pods, pod, _AFTER)["received"]]
        return moved.run(rate_hz, **figures, **_tcp_probe(report) | {"unanswered": len(silent)})

    @contextmanager
    def _probed(
        self, rate_hz: int, *, beside: ClientProgram | None = None
    ) -> Iterator[tuple[Callable[[], Moved], Callable[[], dict[str, Any]]]]:
        """Give (migrate, end the probing): with windows at rest, of the migration and what follows it, and after."""
        with Probing(self._files, {_EVM: self._address}, rate_hz=rate_hz) as probing:

            def mark(name: str) -> None:
                """A load may ask a lot at its mark: that is to be in no window of the probing that counts."""
                for program in (probing, beside) if name == _AFTER else (beside, probing):
                    if program:
                        program.mark(name)

            def move() -> Moved:
                mark(_REST)
                time.sleep(REST_S)  # how long the control lasts
                mark(_MOVE)
                moved = self._move(split=rate_hz <= PROBE_HZ and not self.ipv6)
                mark(_AFTER)
                return moved

            def end() -> dict[str, Any]:
                time.sleep(SETTLE_S)  # each pod is asked meanwhile
                return probing.stop()

            yield move, end

    def _stream(self, rate_hz: int, meanwhile: Callable[[], None]) -> OneWay:
        """Send numbered datagrams while ``meanwhile`` runs."""
        self._streams += 1
        self._guest.ask(f"sink start {self._streams}")
        words = ["one-way", self._address, "--rate", str(rate_hz), "--stream", str(self._streams)]
        with ClientProgram(self._files, "emp.lab.loads", words) as load:
            meanwhile()
            sent = load.stop()
        return OneWay(rate_hz, sent, self._received(sent["sent"]))

    def _received(self, sent: int) -> dict[str, Any]:
        """Return what the guest has counted, once it has all or no more comes."""
        deadline_s, before = time.monotonic() + RECEIVED_S, -1
        while True:
            counted: dict[str, Any] = self._guest.ask("sink")
            if counted["received"] >= sent or (counted["received"] == before and time.monotonic() > deadline_s):
                return counted
            before = counted["received"]
            time.sleep(0.1)

    # -- the migration

    def _move(self, *, split: bool) -> Moved:
        """``split``: measure the emulator's share."""
        source = self.client.evms.get(self.name).owner
        if source is None:
            raise HostError(f"nobody owns {self.name}")
        target = next(node for node in NODES if node != source)
        began_s, topology = time.monotonic(), self.state.topology
        with ExitStack() as watching:
            witness = watching.enter_context(FrameWitness(topology, self._macs, self._addresses))
            capture = None
            if split:  # it would take too much of the processor on a fast stream
                capture = watching.enter_context(
                    TapCapture(topology, target, interface_name(self.name, 0), self._address)
                )
            begun = self.client.migrations.start(self.name, target=target)
            *_, ended = self.client.migrations.events(begun.id)
            time.sleep(SETTLE_S)  # what comes late is counted, and seen
        if ended.outcome is not Outcome.COMPLETED:
            raise HostError(f"migration {ended.id} ended {ended.outcome}: {ended.cause}")
        resumed_s = known(ended.report.resumed_at_s, "resumed_at_s") - time.time() + time.monotonic()
        return Moved(
            ended,
            capture.passed.emulator_ms(resumed_s) if capture else None,
            tuple(frames.violations(witness.seen, self._tenures(source, began_s))),
            witness.dropped,
        )

    def _tenures(self, source: str, began_s: float) -> list[owners.Tenure]:
        hits = {node: faults.hits(self._files.faults(node)) for node in NODES}
        return owners.tenures(source, hits, since_s=began_s)


def echoed(report: dict[str, Any], name: str, *targets: str) -> Stream:
    """Return what became of the requests of one window of the prober, over all these targets."""
    figures = [window(report, target, name) for target in targets]
    return _sum([Stream(*(part[key] for key in ("sent", "lost", "duplicated", "reordered"))) for part in figures])


def _ipv6_gap_s(move: AddressMove | None) -> float | None:
    """Return how long addresses were nobody's; a lower bound is no measurement."""
    return None if move is None or move.ipv6_gap_is_least else move.ipv6_gap_s


def _sum(streams: list[Stream]) -> Stream:
    names = ("sent", "lost", "duplicated", "reordered")
    return Stream(**{name: sum(getattr(stream, name) for stream in streams) for name in names})


def _probe_figures(report: dict[str, Any]) -> dict[str, Any]:
    move = window(report, _EVM, _MOVE)
    return {
        "stream": echoed(report, _MOVE, _EVM),
        "at_rest": echoed(report, _REST, _EVM),
        "gap_ms": float(move["gap_ms"]),
        "late_ms": float(move["prober_stall_ms"]),
    }


def _tcp_probe(report: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the one TCP connection that the prober has."""
    tcp = report["targets"][_EVM]["tcp"]
    (figures,) = (part for part in tcp["windows"] if part["name"] == _MOVE)
    return {"resets": tcp["resets"], "stall_ms": figures["gap_ms"], "unanswered": 0 if tcp["connected"] else 1}


def known(figure: float | None, name: str) -> float:
    """Return a figure of a report; ``HostError`` if it is not there."""
    if figure is None:
        raise HostError(f"the migration's report has no {name}")
    return figure
