"""From what each rank logs to what SwanLab gets: the view over ranks, step by step.

A value waits until every rank that is running has reported it for that step, or has logged a later step, or a
deadline passed. Then the step is written once. A value that comes after that is still written as its rank's own
series, and counted as late.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, nan
from typing import Any

from swanlab_ray.actors.protocol import JOB, RANK, USER, Scalars

Emit = Callable[[int, int, dict[str, float]], None]
"""``emit(step, time_ns, values)``: write these at that step, with that original time."""

DEADLINE_S = 30.0
"""How long a step waits for a rank that is there but silent about it."""
JOIN_DEADLINE_S = 120.0
"""The same while ranks have not said hello yet: the first import of a large job is slow."""
WAITING_STEPS = 10_000
"""Steps that may wait for a rank; beyond that the one that came first is written with what is there."""
WAITING_VALUES = 2_000_000
"""The same for values."""
CLOSED_STEPS_KEPT = 10_000
"""Steps remembered as written, to tell a late value from a new step."""
OVER_RANKS = ("mean", "min", "max", "p95", "argmax")
"""What is computed over ranks: ``p95`` is that of the nearest rank, ``argmax`` the lowest rank that has the maximum.
``nonfinite`` counts the ranks that reported NaN or infinity, where there are any."""
SHAPES = 1_000
"""Sets of names that are known by heart."""


class _Name(dict[int, str]):
    """What is the same for a name at every step: its series, by rank, and over ranks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.reporters: set[int] = set()
        """Ranks that have ever logged it."""
        self.over_ranks = [f"ranks/{name}/{what}" for what in OVER_RANKS]

    def __missing__(self, rank: int) -> str:
        series = self[rank] = f"rank/{rank}/{self.name}"
        return series


@dataclass(slots=True)
class _Shape:
    """What is the same for calls of the same names in the same order."""

    scope: int
    names: list[_Name]
    reporters: set[int] = field(default_factory=set)
    ranks: list[int] = field(default_factory=list)
    """Those that logged it last; mostly they are the same at every step."""
    keys: list[list[str]] = field(default_factory=list)
    """Of each name, the series of these ranks and over them."""


@dataclass(slots=True)
class _Waiting:
    """Values of one name at one step, by rank."""

    scope: int
    time_ns: int
    name: _Name
    by_rank: dict[int, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Row:
    """One step that is not complete yet: call by call while every rank logs the same in one call, else by name."""

    since: float
    shape: _Shape | None
    calls: dict[int, Scalars] = field(default_factory=dict)
    names: dict[str, _Waiting] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)


class Aggregator:
    """Reduces scalars over ranks.

    Args:
        emit: receives what is to be written.
        rank_series: how many ranks get series of their own.
    """

    def __init__(self, emit: Emit, rank_series: int) -> None:
        self._emit = emit
        self._rank_series = rank_series
        self._rows: OrderedDict[int, _Row] = OrderedDict()  # of a dict the first is found slowly
        self._closed: OrderedDict[int, None] = OrderedDict()
        self._reached: dict[int, int] = {}  # rank -> the highest step it has logged
        self._names: dict[str, _Name] = {}
        self._shapes: dict[tuple[int, *tuple[str, ...]], _Shape] = {}
        self._missing_ranks = 1
        self._values = 0  # in _rows
        self.late = 0
        self.highest_step = -1

    def set_ranks(self, running: set[int], missing: int) -> None:
        """Say which ranks are running, and how many have not said hello yet."""
        self._reached = {rank: self._reached.get(rank, -1) for rank in running}
        self._missing_ranks = missing

    def restart_rank(self, rank: int) -> None:
        """A new life of this rank begins: it may go back to an earlier step."""
        self._reached[rank] = -1

    def rewind(self, step: int) -> None:
        """Steps from this one on are run again: what is logged there is not late, it is written once more."""
        for closed in [closed for closed in self._closed if closed >= step]:
            del self._closed[closed]
        for row in (row for pending, row in self._rows.items() if pending >= step):
            row.written.clear()

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
        if scalars.scope == JOB:
            self._emit(step, scalars.time_ns, scalars.values)
            return
        if step in self._closed:
            self._write_late(rank, scalars)
            return
        shape = self._shapes.get((scalars.scope, *scalars.values)) or self._new_shape(scalars)
        if rank not in shape.reporters:
            shape.reporters.add(rank)
            for name in shape.names:
                name.reporters.add(rank)
        row = self._rows.get(step)
        if row is None:
            while self._rows and (len(self._rows) >= WAITING_STEPS or self._values > WAITING_VALUES):
                self._close(next(iter(self._rows)))
            row = self._rows[step] = _Row(now, shape)
        calls = row.calls
        if row.shape is shape and rank not in calls:
            calls[rank] = scalars
            self._values += len(shape.names)
            if len(calls) >= len(reached) and self._complete(calls):
                self._write_calls(step, row)
                row.written.update(scalars.values)
            return
        self._separate(row)
        self._add_by_name(rank, scalars, row)

    def _complete(self, by_rank: dict[int, Any]) -> bool:
        return not self._missing_ranks and len(by_rank) >= len(self._reached) and self._reached.keys() <= by_rank.keys()

    def _separate(self, row: _Row) -> None:
        """From now on by name."""
        calls, row.calls, row.shape = row.calls, {}, None
        for rank, scalars in calls.items():
            self._values -= len(scalars.values)
            for key, value in scalars.values.items():
                self._hold(rank, key, value, scalars, row)

    def _hold(self, rank: int, key: str, value: float, scalars: Scalars, row: _Row) -> _Waiting:
        waiting = row.names.get(key)
        if waiting is None:
            waiting = row.names[key] = _Waiting(scalars.scope, scalars.time_ns, self._name(key))
        if rank not in waiting.by_rank:
            self._values += 1
        waiting.by_rank[rank] = value
        waiting.time_ns = max(waiting.time_ns, scalars.time_ns)
        return waiting

    def _add_by_name(self, rank: int, scalars: Scalars, row: _Row) -> None:
        complete: list[_Waiting] = []
        late: dict[str, float] = {}
        for key, value in scalars.values.items():
            if key in row.written and key not in row.names:
                late[key] = value
            elif self._complete(self._hold(rank, key, value, scalars, row).by_rank):
                complete.append(row.names.pop(key))
                row.written.add(key)
        self._write_names(scalars.step, complete)
        if late:
            self._write_late(rank, Scalars(scalars.step, scalars.time_ns, scalars.scope, late))

    def passed(self, rank: int, step: int) -> None:
        """A rank is at this step, whatever it has logged: it is done with those before."""
        if step > self._reached.get(rank, step):
            self._reached[rank] = step

    def tick(self, now: float) -> None:
        """Write the steps that every running rank has left behind, or that have waited too long. ``now`` as in add."""
        reached = -1 if self._missing_ranks else min(self._reached.values(), default=inf)
        deadline = now - (JOIN_DEADLINE_S if self._missing_ranks else DEADLINE_S)
        for step in sorted(step for step, row in self._rows.items() if step < reached or row.since <= deadline):
            self._close(step)

    def flush(self) -> None:
        """Write everything that waits: the run ends."""
        for step in sorted(self._rows):
            self._close(step)

    def _name(self, key: str) -> _Name:
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = _Name(key)
        return name

    def _new_shape(self, scalars: Scalars) -> _Shape:
        if len(self._shapes) >= SHAPES:
            self._shapes.clear()
        shape = _Shape(scalars.scope, [self._name(key) for key in scalars.values])
        self._shapes[scalars.scope, *scalars.values] = shape
        return shape

    def _close(self, step: int) -> None:
        row = self._rows.pop(step)
        self._write_calls(step, row)
        self._write_names(step, row.names.values())
        self._closed[step] = None
        if len(self._closed) > CLOSED_STEPS_KEPT:
            self._closed.popitem(last=False)

    def _write_calls(self, step: int, row: _Row) -> None:
        """Write the calls of a step as one row."""
        calls, shape, row.calls, row.shape = row.calls, row.shape, {}, None
        if shape is None:
            return
        ranks = sorted(calls)
        if ranks != shape.ranks:
            shape.ranks, shape.keys = ranks, [self._keys(name, ranks) for name in shape.names]
        self._values -= len(ranks) * len(shape.names)
        values: dict[str, float] = {}
        columns = zip(*[calls[rank].values.values() for rank in ranks], strict=True)
        for name, keys, column in zip(shape.names, shape.keys, columns, strict=True):
            self._put(values, name, keys, shape.scope, ranks, column)
        if values:
            self._emit(step, max([call.time_ns for call in calls.values()]), values)

    def _write_names(self, step: int, names: Iterable[_Waiting]) -> None:
        """Write these names of a step: as one row, but for those that were logged at another time."""
        rows: dict[int, dict[str, float]] = {}
        for waiting in names:
            self._values -= len(waiting.by_rank)
            ranks = sorted(waiting.by_rank)
            column = [waiting.by_rank[rank] for rank in ranks]
            keys = self._keys(waiting.name, ranks)
            self._put(rows.setdefault(waiting.time_ns, {}), waiting.name, keys, waiting.scope, ranks, column)
        for time_ns, values in rows.items():
            if values:
                self._emit(step, time_ns, values)

    def _keys(self, name: _Name, ranks: list[int]) -> list[str]:
        """The series of these ranks, and those over ranks."""
        return [name[rank] for rank in ranks if rank < self._rank_series] + name.over_ranks

    @staticmethod
    def _put(
        values: dict[str, float],
        name: _Name,
        keys: list[str],
        scope: int,
        ranks: list[int],
        column: Sequence[float],
    ) -> None:
        """Add the series of one name to a row. ``ranks`` are in order, so that those with a series come first."""
        alone = len(name.reporters) == 1
        if alone and scope == USER:
            values[name.name] = column[0]
            return
        shown = len(keys) - len(OVER_RANKS)
        if alone:
            values.update(zip(keys, column[:shown], strict=False))
            return
        reduced, nonfinite = over_ranks(ranks, column)
        if scope == USER:
            values[name.name] = reduced[0]
        values.update(zip(keys, (*column[:shown], *reduced), strict=False))
        if nonfinite:
            values[f"ranks/{name.name}/nonfinite"] = float(nonfinite)

    def _write_late(self, rank: int, scalars: Scalars) -> None:
        for key, value in scalars.values.items():
            name = self._name(key)
            name.reporters.add(rank)
            if name.reporters == {rank} and scalars.scope != RANK:
                # Nobody else logs this name, so nothing was reduced without it.
                self._emit(scalars.step, scalars.time_ns, {key: value})
                continue
            self.late += 1
            if rank < self._rank_series:
                self._emit(scalars.step, scalars.time_ns, {name[rank]: value})


def over_ranks(ranks: Sequence[int], column: Sequence[float]) -> tuple[list[float], int]:
    """The values of :data:`OVER_RANKS` over those that are finite, and how many are not; only NaN where none is.

    Args:
        ranks: in order.
        column: the value of each.
    """
    ordered = sorted(column)
    total, nonfinite = sum(ordered), 0
    if not isfinite(total):
        ordered = sorted(filter(isfinite, column))
        nonfinite = len(column) - len(ordered)
        if not ordered:
            return [nan], nonfinite
        total = sum(ordered)
    count, highest = len(ordered), ordered[-1]
    # The sum may overflow although no value does.
    mean = total / count if isfinite(total) else sum(value / count for value in ordered)
    p95 = ordered[count - count // 20 - 1]
    return [mean, ordered[0], highest, p95, float(ranks[column.index(highest)])], nonfinite
