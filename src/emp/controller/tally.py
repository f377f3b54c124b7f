"""What one migration looks like to people, put together from its record and what both ends have said. Pure.

Progress changes four times a second and is only shown; what is in ``_WEIGHTY`` is worth a write to the store.
"""

from __future__ import annotations

from emp.migration.report import build_report
from emp.migration.supervisor import Phase, Supervisor
from emp.migration.watch import advice
from emp.model.addresses import AddressMove
from emp.model.clock import GuestClock
from emp.model.migration import Migration, Outcome, Report, Stage, VolumeMove, VolumeStep
from emp.model.orders import Prepared, Role, RolePhase, RoleStatus

_WEIGHTY = ("stage", "outcome", "cause", "hint", "committed", "addresses_ordered", "abort_asked", "nonce", "report")
_COMMITTED = (RolePhase.GIVEN, RolePhase.ACTIVATED, RolePhase.DONE, RolePhase.RUNNING)
_ENDING = (Phase.FINISHING, Phase.DETACHING, Phase.CLOSED)
_BACK = (Phase.SETTLING, Phase.DETACHING)


class Tally:
    def __init__(self, migration: Migration) -> None:
        self.migration = migration
        self.answer: Prepared | None = None
        """the target's, to the order to prepare"""
        self._written = migration
        self._said: dict[Role, RoleStatus] = {}
        self._moves: tuple[VolumeMove, ...] = migration.report.volumes
        self._addresses: AddressMove | None = migration.report.addresses

    # -------------------------------------------------------------- what happens

    def prepared(self, answer: Prepared) -> None:
        self.answer = answer
        self._set(nonce=answer.nonce)

    def heard(self, status: RoleStatus) -> None:
        """Take a snapshot of one end. After the end nothing changes any more."""
        if self.migration.stage is Stage.CLOSED:
            return
        self._said[status.role] = status
        if status.role is Role.SOURCE and status.progress.memory_bytes:
            self._set(progress=status.progress)
        committed = any(said.phase in _COMMITTED for said in self._said.values())
        self._set(committed=committed, stage=self._stage())

    def abort_asked(self, reason: str) -> None:
        if self.migration.abort_asked is None:
            self._set(abort_asked=reason)

    def stands(self, state: Supervisor) -> None:
        """Take the supervisor's state: why it goes back, and that the last stage has begun."""
        if state.cause is not None and state.outcome is not Outcome.COMPLETED:
            self._set(cause=state.cause)
        if state.outcome is Outcome.ABORTED and state.phase in _BACK and self.migration.outcome is None:
            # The EVM is back; what is left is to clear the target, which may take as long as that is away.
            self._set(outcome=Outcome.ABORTED, report=self._report(None))
        if state.outcome is Outcome.COMPLETED and state.phase in _ENDING and self.migration.stage is not Stage.CLOSED:
            self._set(stage=Stage.TARGET_BROWNOUT, committed=True, cause=None)

    def waits(self, hint: str | None) -> None:
        """Say what the migration waits for, if for anything."""
        if self.migration.stage is not Stage.CLOSED:
            self._set(hint=hint)

    def closed(self, outcome: Outcome, cause: str | None, at_s: float, clock: GuestClock | None = None) -> Migration:
        """Return the final record; ``at_s`` is the wall clock, ``clock`` the guest's, where it runs now."""
        report = self._report(at_s).model_copy(update={"clock": clock})
        self._set(
            stage=Stage.CLOSED,
            outcome=outcome,
            cause=cause,
            hint=_HINTS.get(outcome, "").format(evm=self.migration.evm) or advice(report.watch),
            committed=outcome is not Outcome.ABORTED and self.migration.committed,
            ended_at=at_s,
            moving=(),
            report=report,
        )
        return self.migration

    def moved(self, moves: tuple[VolumeMove, ...]) -> None:
        """Take how volumes were moved. What was known of one already stands: a restarted controller looks again."""
        self._moves = tuple(({move.volume: move for move in (*moves, *self._moves)}).values())
        self._set(report=self.migration.report.model_copy(update={"volumes": self._moves}))

    def orders_addresses(self) -> None:
        self._set(addresses_ordered=True)

    def readdressed(self, move: AddressMove) -> None:
        """Take how the addresses were moved; what was known already stands."""
        self._addresses = self._addresses or move
        self._set(report=self.migration.report.model_copy(update={"addresses": self._addresses}))

    def moving(self, steps: tuple[VolumeStep, ...]) -> None:
        """Take which volumes are on their way, and where each is."""
        if self.migration.stage is not Stage.CLOSED:
            self._set(moving=steps)

    def written(self, migration: Migration) -> None:
        self._written = migration

    @property
    def worth_writing(self) -> bool:
        return any(getattr(self.migration, field) != getattr(self._written, field) for field in _WEIGHTY)

    @property
    def unheard(self) -> tuple[Role, ...]:
        """The ends that have not said anything to this process."""
        return tuple(role for role in Role if role not in self._said)

    # -------------------------------------------------------------- how it is put together

    def _set(self, **update: object) -> None:
        self.migration = self.migration.model_copy(update=update)

    def _stage(self) -> Stage:
        source, target = self._said.get(Role.SOURCE), self._said.get(Role.TARGET)
        if target is not None and target.phase is RolePhase.RUNNING:
            return Stage.TARGET_BROWNOUT
        if source is None or source.stage is Stage.CLOSED:
            return self.migration.stage
        return source.stage

    def _report(self, at_s: float | None) -> Report:
        source, target = self._said.get(Role.SOURCE), self._said.get(Role.TARGET)
        return build_report(
            source.figures if source else None,
            target.figures if target else None,
            memory_bytes=self.migration.progress.memory_bytes,
            closed_at_s=at_s,
            watch=source.watch if source else (),
        ).model_copy(update={"volumes": self._moves, "addresses": self._addresses})


_HINTS = {Outcome.LOST: "neither copy could go on; a cold restart: emp evm recover {evm}"}
