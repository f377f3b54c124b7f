"""What the controller tells Prometheus, from a registry of its own."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from emp.controller.book import Book
from emp.controller.nodes import Nodes
from emp.model.evm import EvmState
from emp.model.migration import Migration, Outcome, Stage

_BROWNOUT_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
_PAUSE_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2.5, 10)


class _Pool(Collector):
    """What there is now, counted when it is asked for."""

    def __init__(self, book: Book, nodes: Nodes) -> None:
        self._book = book
        self._nodes = nodes

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        nodes = GaugeMetricFamily("emp_nodes", "Nodes of the pool", labels=["state"])
        known = self._nodes.all()
        nodes.add_metric(["ready"], sum(node.ready for node in known))
        nodes.add_metric(["down"], sum(not node.ready for node in known))
        nodes.add_metric(["fenced"], sum(node.fence is not None for node in known))
        nodes.add_metric(["quarantined"], sum(node.quarantine is not None for node in known))
        yield nodes
        yield GaugeMetricFamily(
            "emp_nodes_cordoned", "Nodes that take nothing new", value=sum(n.cordoned for n in known)
        )
        evms = GaugeMetricFamily("emp_evms", "EVMs by state", labels=["state"])
        states = Count(evm.state for evm in self._book.evms.all())
        for state in EvmState:
            evms.add_metric([state], states[state])
        yield evms
        is_open = sum(migration.stage is not Stage.CLOSED for migration in self._book.migrations.all())
        yield GaugeMetricFamily("emp_migrations_open", "Migrations under way", value=is_open)
        yield GaugeMetricFamily("emp_store_revision", "Newest revision of the store", value=self._book.revision)
        yield from self._traffic()

    def _traffic(self) -> Iterator[CounterMetricFamily]:
        """As the owners last reported; an EVM keeps its counts over migrations."""
        per_evm = "at an EVM's taps, over its migrations"
        frames = CounterMetricFamily("emp_evm_frames", f"Frames {per_evm}", labels=["evm", "direction"])
        octets = CounterMetricFamily("emp_evm_bytes", f"Bytes {per_evm}", labels=["evm", "direction"])
        dropped = CounterMetricFamily("emp_evm_dropped_frames", f"Frames lost {per_evm}", labels=["evm", "why"])
        for evm in self._book.evms.all():
            told = self._nodes.report_of(evm)
            if told is None or told.traffic is None:
                continue
            counted = told.traffic
            frames.add_metric([evm.spec.name, "received"], counted.received_frames)
            frames.add_metric([evm.spec.name, "sent"], counted.sent_frames)
            octets.add_metric([evm.spec.name, "received"], counted.received_bytes)
            octets.add_metric([evm.spec.name, "sent"], counted.sent_bytes)
            dropped.add_metric([evm.spec.name, "not taken"], counted.dropped_frames)
            dropped.add_metric([evm.spec.name, "spoofed"], counted.spoofed_frames)
        yield from (frames, octets, dropped)


class Metrics:
    def __init__(self, book: Book, nodes: Nodes) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Pool(book, nodes))
        self._outcomes = Counter(
            "emp_migrations", "Migrations that ended, since this process started", ["outcome"], registry=self.registry
        )
        for outcome in Outcome:
            self._outcomes.labels(outcome)
        stage = "How long a stage of a migration took"
        self._source_brownout = Histogram(
            "emp_migration_source_brownout_seconds", stage, buckets=_BROWNOUT_S, registry=self.registry
        )
        self._blackout = Histogram("emp_migration_blackout_seconds", stage, buckets=_PAUSE_S, registry=self.registry)
        self._target_brownout = Histogram(
            "emp_migration_target_brownout_seconds", stage, buckets=_BROWNOUT_S, registry=self.registry
        )
        self._vcpu_pause = Histogram(
            "emp_migration_vcpu_pause_seconds",
            "From the source's STOP to the target's RESUME",
            buckets=_PAUSE_S,
            registry=self.registry,
        )

    def migrated(self, migration: Migration) -> None:
        """Count a migration that has been closed."""
        assert migration.outcome is not None
        self._outcomes.labels(migration.outcome).inc()
        stages = migration.report.stages
        if migration.outcome is not Outcome.COMPLETED:
            return
        for histogram, seconds in (
            (self._source_brownout, stages.source_brownout_s),
            (self._blackout, _seconds(stages.blackout_ms)),
            (self._target_brownout, stages.target_brownout_s),
            (self._vcpu_pause, _seconds(migration.report.vcpu_pause_ms)),
        ):
            if seconds is not None:
                histogram.observe(seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self.registry)


def _seconds(span_ms: float | None) -> float | None:
    return None if span_ms is None else span_ms / 1000
