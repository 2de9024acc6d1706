"""From what each rank logs to what SwanLab gets: the view over ranks, step by step.

The values of a name at a step wait until every rank that is running has reported them, or has logged a later step, or
none is expected any more, or a deadline passed. Then they are written once. A value that comes after that is still
written as its rank's own series, and counted as late; what a rank logs again at a step is counted as repeated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from math import inf

from swanlab_ray.actors.reduction.over_ranks import Name, Names, Shape, put
from swanlab_ray.actors.reduction.waiting import Calls, Row, Waiting
from swanlab_ray.actors.reduction.written import NOBODY, Group, Written
from swanlab_ray.actors.wire.events import JOB, Scalars

Emit = Callable[[int, int, dict[str, float]], None]
"""``emit(step, time_ns, values)``: write these at that step, with that original time."""
NonFinite = Callable[[int, str, int, int, float], None]

PATIENCE_S = 2.0
"""How long values wait for ranks of which none is expected to report them."""
RANKS_PER_SECOND = 500
"""With many ranks that is longer: they send less often."""
AHEAD = 2
"""Steps by which a rank can only be ahead of another that does not log a new name at all: they train together."""
DEADLINE_S = 30.0
"""How long values wait for a rank that is there, has reported them before, and is silent about them."""
JOIN_DEADLINE_S = 120.0
"""The same while ranks have not said hello yet: the first import of a large job is slow."""
WAITING_STEPS = 10_000
"""Steps that may wait for a rank; beyond that the one that came first is written with what is there."""
WAITING_VALUES = 2_000_000
"""The same for values."""


class Aggregator:
    """Reduces scalars over ranks.

    Args:
        emit: receives what is to be written.
        rank_series: how many ranks get series of their own.
        emit_again: receives what replaces earlier rows, of a training that has gone back; by default as any other.
        on_repeated: ``on_repeated(rank, name, step)`` is told of a value that is not the first of its rank and step.
        on_nonfinite: ``on_nonfinite(rank, name, step, time_ns, value)`` is told of NaN or infinity: for each name and
            step once, of the lowest rank that has it.
    """

    def __init__(
        self,
        emit: Emit,
        rank_series: int,
        emit_again: Emit | None = None,
        on_repeated: Callable[[int, str, int], None] = lambda rank, name, step: None,
        on_nonfinite: NonFinite = lambda rank, name, step, time_ns, value: None,
    ) -> None:
        self._emit = emit
        self._emit_again = emit_again or emit
        self._on_repeated = on_repeated
        self._on_nonfinite = on_nonfinite
        self._rank_series = rank_series
        self._rows: OrderedDict[int, Row] = OrderedDict()  # of a dict the first is found slowly
        self._written = Written()
        self._reached: dict[int, int] = {}  # running rank -> the highest step it has logged
        self._names = Names()
        self._shapes = self._names.shapes
        self._job: dict[str, tuple[int, float]] = {}  # the latest of each name that is reduced already
        self._missing_ranks = 1
        self._values = 0  # in _rows
        self.late = 0
        """Values that came when their name had been written at their step."""
        self.repeated = 0
        """Values of a rank for a name at a step that it had logged before: the first one stands."""
        self.replaced = 0
        """Values that waited, and were logged again by a training that had gone back."""
        self.highest_step = -1

    def set_ranks(self, running: set[int], missing: int) -> None:
        """Say which ranks are running, and how many have not said hello yet."""
        self._reached = {rank: self._reached.get(rank, -1) for rank in running}
        self._missing_ranks = missing

    def restart_rank(self, rank: int) -> None:
        """A new life of this rank begins: it may go back to an earlier step."""
        self._reached[rank] = -1

    def rewind(self, rank: int, step: int) -> None:
        """From this step on this rank runs its steps again: what it logs there is not late, and is written once more,
        together with what other ranks log there again."""
        self._written.rewind(rank, step)
        for row in (row for pending, row in self._rows.items() if pending >= step):
            row.rewind(rank)
        if rank in self._reached:
            self._reached[rank] = step - 1

    def logged(self, rank: int, scalars: Scalars) -> bool:
        """Whether this rank has logged one of these names at this step, and has not gone back since."""
        ids, row = self._names.shape(scalars).ids, self._rows.get(scalars.step)
        return (row is not None and row.holds(rank, ids)) or self._written.holds(rank, scalars.step, ids)

    @property
    def waiting(self) -> bool:
        """Whether steps wait for ranks that have not logged them."""
        return bool(self._rows)

    def add(self, rank: int, scalars: Scalars, now: float) -> None:
        """Take one ``log()`` call of a rank. ``now`` is the time in seconds."""
        step = scalars.step
        if step > self.highest_step:
            self.highest_step = step
        reached = self._reached
        if step > reached.get(rank, step):
            reached[rank] = step
        shape = self._shapes.get((scalars.scope, *scalars.values)) or self._names.shape(scalars)
        row = self._rows.get(step)
        again = False
        if row is None or row.mixed or shape.scope == JOB:
            written = self._written.at(step)
            if written or step < self._written.certain:
                fresh, again = self._fresh(rank, scalars, shape, written, row)
                if not fresh:
                    return
                if len(fresh) < len(scalars.values):
                    scalars = Scalars(step, scalars.time_ns, scalars.scope, fresh)
                    shape = self._names.shape(scalars)
            if shape.scope == JOB:
                self._write_job(rank, scalars, shape, again)
                return
            if row is None and len(reached) == 1 and rank in reached and not self._missing_ranks:
                if rank not in shape.reporters:
                    shape.report(rank)
                self._values += len(shape.names)
                self._write_calls(step, shape, Calls(now, again, {rank: scalars}))
                return
            if row is None:
                row = self._new_row(step, now, bool(written) or step < self._written.certain)
        if rank not in shape.reporters:
            shape.report(rank)
        calls = row.calls.get(shape)
        if calls is None:
            if row.names or (row.calls and not all(shape.ids.isdisjoint(other.ids) for other in row.calls)):
                self._add_by_name(rank, scalars, shape, row, now, again)
                return
            calls = row.calls[shape] = Calls(now)
        if again:
            calls.again = True
        by_rank = calls.by_rank
        if rank in by_rank:
            if rank not in calls.back:
                self._repeat(rank, scalars.step, scalars.values)
                return
            calls.back -= {rank}
            self.replaced += len(shape.names)
        else:
            self._values += len(shape.names)
        by_rank[rank] = scalars
        if len(by_rank) >= len(reached) and self._complete(calls):
            del row.calls[shape]
            self._leave(step, row)
            self._write_calls(step, shape, calls)

    def _new_row(self, step: int, now: float, mixed: bool) -> Row:
        while self._rows and (len(self._rows) >= WAITING_STEPS or self._values > WAITING_VALUES):
            self._close(next(iter(self._rows)))
        behind = not self._missing_ranks and step < min(self._reached.values(), default=step)
        row = self._rows[step] = Row(now, behind, mixed)
        return row

    def _leave(self, step: int, row: Row) -> None:
        """Something of this row is written: forget it when nothing else waits in it."""
        row.mixed = True
        if not row.calls and not row.names:
            self._rows.pop(step, None)

    def _complete(self, waiting: Calls | Waiting) -> bool:
        return not self._missing_ranks and not waiting.back and self._reached.keys() <= waiting.by_rank.keys()

    def _separate(self, row: Row, shape: Shape) -> None:
        """From now on by name."""
        calls = row.calls.pop(shape)
        for rank, scalars in calls.by_rank.items():
            self._values -= len(shape.names)
            for name, value in zip(shape.names, scalars.values.values(), strict=True):
                self._hold(rank, name, value, scalars, row, calls.since, calls.again)
        for name in shape.names:
            row.names[name.id].back |= calls.back

    def _hold(
        self, rank: int, name: Name, value: float, scalars: Scalars, row: Row, now: float, again: bool
    ) -> Waiting:
        waiting = row.names.get(name.id)
        if waiting is None:
            waiting = row.names[name.id] = Waiting(scalars.scope, scalars.time_ns, now, name)
        waiting.again |= again
        if rank not in waiting.by_rank:
            self._values += 1
        elif rank in waiting.back:
            waiting.back -= {rank}
            self.replaced += 1
        else:
            self._repeat(rank, scalars.step, (name.name,))
            return waiting
        waiting.by_rank[rank] = value
        waiting.time_ns = max(waiting.time_ns, scalars.time_ns)
        return waiting

    def _add_by_name(self, rank: int, scalars: Scalars, shape: Shape, row: Row, now: float, again: bool) -> None:
        for other in [other for other in row.calls if not shape.ids.isdisjoint(other.ids)]:
            self._separate(row, other)
        complete: list[Waiting] = []
        for name, value in zip(shape.names, scalars.values.values(), strict=True):
            if self._complete(self._hold(rank, name, value, scalars, row, now, again)):
                complete.append(row.names.pop(name.id))
        self._write_names(scalars.step, complete)
        self._leave(scalars.step, row)

    # What was written before.

    def _fresh(
        self, rank: int, scalars: Scalars, shape: Shape, written: dict[frozenset[str], Group] | None, row: Row | None
    ) -> tuple[dict[str, float], bool]:
        """Those of these values that are neither late nor logged again, and whether they replace others."""
        step = scalars.step
        again = step < self._written.lowered
        if step >= self._written.floor and all(shape.ids.isdisjoint(ids) for ids in written or ()):
            return scalars.values, again
        fresh: dict[str, float] = {}
        late: dict[str, float] = {}
        repeated: dict[str, float] = {}
        reopened = []
        for name, (key, value) in zip(shape.names, scalars.values.items(), strict=True):
            group = self._written.find(step, name.id)
            if group is None and (not self._written.forgotten(step, name.id) or (row is not None and row.has(name.id))):
                fresh[key] = value
            elif group is None:
                first = name.reporters != {rank} and self._written.first_below(rank, step, name.id)
                (late if first else repeated)[key] = value
            elif rank in group.back:
                reopened.append(name.id)
                fresh[key] = value
            elif rank in group.ranks:
                repeated[key] = value
            else:
                late[key] = value
        if reopened:
            self._written.reopen(step, reopened)
        if late:
            self._write_late(rank, scalars, late)
        if repeated:
            self._repeat(rank, step, self._differing(scalars, repeated))
        return fresh, again or bool(reopened)

    def _differing(self, scalars: Scalars, repeated: dict[str, float]) -> list[str]:
        """Trainers log their epoch with everything: what is the same once more is nothing new."""
        if scalars.scope != JOB:
            return list(repeated)
        return [key for key, value in repeated.items() if self._job.get(key) not in ((scalars.step, value), None)]

    def _repeat(self, rank: int, step: int, names: Iterable[str]) -> None:
        for name in names:
            self.repeated += 1
            self._on_repeated(rank, name, step)

    def _write_late(self, rank: int, scalars: Scalars, late: dict[str, float]) -> None:
        self.late += len(late)
        names = {key: self._names.name(key, scalars.scope) for key in late}
        for name in names.values():
            name.reporters.add(rank)
            name.silent.discard(rank)
        own = {names[key][rank]: value for key, value in late.items() if not names[key].measured}
        if own and rank < self._rank_series and scalars.scope != JOB:
            self._emit(scalars.step, scalars.time_ns, own)
        self._written.join(rank, scalars.step, frozenset(name.id for name in names.values()))

    # Time passes.

    def passed(self, rank: int, step: int) -> None:
        """A rank is at this step, whatever it has logged: it is done with those before."""
        if step > self._reached.get(rank, step):
            self._reached[rank] = step

    def tick(self, now: float) -> None:
        """Write what every running rank has left behind, or what has waited long enough. ``now`` as in add."""
        if self._missing_ranks:
            lowest: float = -1
            patience = JOIN_DEADLINE_S
        else:
            lowest = min(self._reached.values(), default=inf)
            patience = PATIENCE_S + len(self._reached) / RANKS_PER_SECOND
        passed, waited = [], []
        for step, row in self._rows.items():
            if step < lowest and not row.behind:
                passed.append(step)
            elif row.since <= now - patience:
                waited.append(step)
        for step in sorted(passed + waited):
            row = self._rows[step]
            if step < lowest and not row.behind:
                self._close(step)
            else:
                self._write_due(step, row, now - patience, now)

    def _write_due(self, step: int, row: Row, before: float, now: float) -> None:
        """Write what nobody is expected to report any more, of what came ``before`` that time."""
        for shape, calls in list(row.calls.items()):
            if calls.since > before or self._all_wait(step, row, shape, calls, now):
                continue
            due = [self._is_due(step, row, name, calls, now) for name in shape.names]
            if all(due):
                del row.calls[shape]
                self._write_calls(step, shape, calls)
            elif any(due):
                self._separate(row, shape)
        complete = [
            key
            for key, waiting in row.names.items()
            if waiting.since <= before and self._is_due(step, row, waiting.name, waiting, now)
        ]
        self._write_names(step, [row.names.pop(key) for key in complete])
        row.since = min((waiting.since for waiting in row.all()), default=now)
        self._leave(step, row)

    def _all_wait(self, step: int, row: Row, shape: Shape, calls: Calls, now: float) -> bool:
        """Whether the rank that is furthest behind is expected to log all of these names; mostly it is that one."""
        slowest = min(self._reached, key=self._reached.__getitem__, default=-1)
        expected = slowest in shape.reporters and slowest not in calls.by_rank
        return expected and now - calls.since < self._deadline and (row.behind or self._reached[slowest] <= step)

    @property
    def _deadline(self) -> float:
        return JOIN_DEADLINE_S if self._missing_ranks else DEADLINE_S

    def _is_due(self, step: int, row: Row, name: Name, waiting: Calls | Waiting, now: float) -> bool:
        """Whether a name that has waited a while is to be written with what is there."""
        reached, there = self._reached, waiting.by_rank
        expected = [
            rank
            for rank in name.reporters - there.keys() - name.silent
            if rank in reached and (row.behind or reached[rank] <= step)
        ]
        if now - waiting.since >= self._deadline:
            self._names.give_up(name, expected)
            return True
        if expected or waiting.back or self._missing_ranks:
            return False
        if name.known or all(reached[rank] > step for rank in reached.keys() - there.keys()):
            return True
        return max((reached.get(rank, -1) for rank in there), default=-1) >= step + AHEAD

    def flush(self) -> None:
        """Write everything that waits: the run ends."""
        for step in sorted(self._rows):
            self._close(step)

    def _close(self, step: int) -> None:
        row = self._rows.pop(step)
        for shape, calls in row.calls.items():
            self._write_calls(step, shape, calls)
        self._write_names(step, row.names.values())

    # Rows.

    def _write_job(self, rank: int, scalars: Scalars, shape: Shape, again: bool) -> None:
        """Write what is reduced already."""
        self._job |= {key: (scalars.step, value) for key, value in scalars.values.items()}
        (self._emit_again if again else self._emit)(scalars.step, scalars.time_ns, scalars.values)
        self._written.add(scalars.step, shape.ids, Group(frozenset({rank}), NOBODY))

    def _write_calls(self, step: int, shape: Shape, waiting: Calls) -> None:
        """Write the calls of a step as one row."""
        calls = waiting.by_rank
        ranks = sorted(calls)
        if ranks != shape.ranks:
            shape.ranks, shape.group = ranks, Group(frozenset(ranks), NOBODY)
            shape.keys = [self._keys(name, ranks) for name in shape.names]
        self._values -= len(ranks) * len(shape.names)
        values: dict[str, float] = {}
        columns = zip(*[calls[rank].values.values() for rank in ranks], strict=True)
        for name, keys, column in zip(shape.names, shape.keys, columns, strict=True):
            bad = put(values, name, keys, shape.scope, ranks, column)
            if bad is not None:
                self._on_nonfinite(bad, name.name, step, calls[bad].time_ns, column[ranks.index(bad)])
        if values:
            emit = self._emit_again if waiting.again else self._emit
            emit(step, max([call.time_ns for call in calls.values()]), values)
        back = waiting.back
        self._written.add(step, shape.ids, Group(shape.group.ranks - back, back) if back else shape.group)
        if not shape.known:
            shape.known = True
            for name in shape.names:
                name.known = True

    def _write_names(self, step: int, names: Iterable[Waiting]) -> None:
        """Write these names of a step: as one row, but for those that were logged at another time."""
        rows: dict[tuple[int, bool], dict[str, float]] = {}
        groups: dict[Group, set[str]] = {}
        for waiting in names:
            self._values -= len(waiting.by_rank)
            ranks = sorted(waiting.by_rank)
            column = [waiting.by_rank[rank] for rank in ranks]
            keys = self._keys(waiting.name, ranks)
            row = rows.setdefault((waiting.time_ns, waiting.again), {})
            bad = put(row, waiting.name, keys, waiting.scope, ranks, column)
            if bad is not None:
                self._on_nonfinite(bad, waiting.name.name, step, waiting.time_ns, waiting.by_rank[bad])
            group = Group(frozenset(ranks) - waiting.back, waiting.back)
            groups.setdefault(group, set()).add(waiting.name.id)
            waiting.name.known = True
        for (time_ns, again), values in rows.items():
            if values:
                (self._emit_again if again else self._emit)(step, time_ns, values)
        for group, ids in groups.items():
            self._written.add(step, frozenset(ids), group)

    def _keys(self, name: Name, ranks: list[int]) -> list[str]:
        """The series of these ranks, and those over ranks."""
        return [name[rank] for rank in ranks if rank < self._rank_series] + name.over_ranks
