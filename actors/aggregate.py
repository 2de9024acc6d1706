"""From what each rank logs to what SwanLab gets: the view over ranks, step by step.

A value waits until every rank that is running has reported it for that step, or has logged a later step, or a
deadline passed. Then the step is written once. A value that comes after that is still written as its rank's own
series, and counted as late.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

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


@dataclass(slots=True)
class _Name:
    """What is the same for a name at every step."""

    name: str
    reporters: set[int] = field(default_factory=set)
    """Ranks that have ever logged it."""
    keys: dict[int | str, str] = field(default_factory=dict)
    """Its series: by rank, and by what is computed over ranks."""

    def of_rank(self, rank: int) -> str:
        key = self.keys.get(rank)
        if key is None:
            key = self.keys[rank] = f"rank/{rank}/{self.name}"
        return key

    def over_ranks(self, what: str) -> str:
        key = self.keys.get(what)
        if key is None:
            key = self.keys[what] = f"ranks/{self.name}/{what}"
        return key


@dataclass(slots=True)
class _Waiting:
    """Values of one name at one step, by rank."""

    scope: int
    time_ns: int
    name: _Name
    by_rank: dict[int, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Row:
    """One step that is not complete yet."""

    since: float
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
        self._rows: dict[int, _Row] = {}
        self._closed: OrderedDict[int, None] = OrderedDict()
        self._reached: dict[int, int] = {}  # rank -> the highest step it has logged
        self._names: dict[str, _Name] = {}
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
        if step > self._reached.get(rank, -1) and rank in self._reached:
            self._reached[rank] = step
        if scalars.scope == JOB:
            self._emit(step, scalars.time_ns, scalars.values)
            return
        if step in self._closed:
            self._write_late(rank, scalars)
            return
        row = self._rows.get(step)
        if row is None:
            while self._rows and (len(self._rows) >= WAITING_STEPS or self._values > WAITING_VALUES):
                self._close(next(iter(self._rows)))
            row = self._rows[step] = _Row(since=now)
        everyone = 1 << 31 if self._missing_ranks else len(self._reached)
        names, time_ns = row.names, scalars.time_ns
        for key, value in scalars.values.items():
            waiting = names.get(key)
            if waiting is None:
                if key in row.written:
                    self._write_late(rank, Scalars(step, time_ns, scalars.scope, {key: value}))
                    continue
                waiting = names[key] = _Waiting(scalars.scope, time_ns, self._name(key))
            by_rank = waiting.by_rank
            if rank not in by_rank:
                self._values += 1
            by_rank[rank] = value
            if time_ns > waiting.time_ns:
                waiting.time_ns = time_ns
            if rank not in waiting.name.reporters:
                waiting.name.reporters.add(rank)
            if len(by_rank) >= everyone and self._reached.keys() <= by_rank.keys():
                self._write(step, names.pop(key))
                row.written.add(key)

    def passed(self, rank: int, step: int) -> None:
        """A rank is at this step, whatever it has logged: it is done with those before."""
        if step > self._reached.get(rank, step):
            self._reached[rank] = step

    def tick(self, now: float) -> None:
        """Write the steps that every running rank has left behind, or that have waited too long. ``now`` as in add."""
        reached = -1 if self._missing_ranks else min(self._reached.values(), default=math.inf)
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

    def _close(self, step: int) -> None:
        for waiting in self._rows.pop(step).names.values():
            self._write(step, waiting)
        self._closed[step] = None
        if len(self._closed) > CLOSED_STEPS_KEPT:
            self._closed.popitem(last=False)

    def _write(self, step: int, waiting: _Waiting) -> None:
        name, by_rank = waiting.name, waiting.by_rank
        self._values -= len(by_rank)
        alone = len(name.reporters) == 1
        if alone and waiting.scope == USER:
            self._emit(step, waiting.time_ns, {name.name: next(iter(by_rank.values()))})
            return
        values = {name.of_rank(rank): value for rank, value in by_rank.items() if rank < self._rank_series}
        if not alone:
            reduced = over_ranks(by_rank)
            if waiting.scope == USER:
                values[name.name] = reduced["mean"]
            for what, value in reduced.items():
                values[name.over_ranks(what)] = value
        if values:
            self._emit(step, waiting.time_ns, values)

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
                self._emit(scalars.step, scalars.time_ns, {name.of_rank(rank): value})


def over_ranks(by_rank: dict[int, float]) -> dict[str, float]:
    """Mean, min, max, p95 (nearest rank) and the rank of the maximum, over the finite values.

    ``nonfinite`` counts the ranks that reported NaN or infinity, where there are any.
    """
    ordered = sorted(by_rank.values())
    total, bad = sum(ordered), 0
    if not math.isfinite(total):
        ordered = sorted(filter(math.isfinite, by_rank.values()))
        bad = len(by_rank) - len(ordered)
        if not ordered:
            return {"mean": math.nan, "nonfinite": float(bad)}
        total = sum(ordered)
    count, highest = len(ordered), ordered[-1]
    reduced = {
        # The sum may overflow although no value does.
        "mean": total / count if math.isfinite(total) else sum(value / count for value in ordered),
        "min": ordered[0],
        "max": highest,
        "p95": ordered[math.ceil(0.95 * count) - 1],
        "argmax": float(min([rank for rank, value in by_rank.items() if value == highest])),
    }
    if bad:
        reduced["nonfinite"] = float(bad)
    return reduced
