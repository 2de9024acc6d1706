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
CLOSED_STEPS_KEPT = 10_000
"""Steps remembered as written, to tell a late value from a new step."""


@dataclass(slots=True)
class _Waiting:
    """Values of one name at one step, by rank."""

    scope: int
    time_ns: int
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
        self._reporters: dict[str, set[int]] = {}
        self._missing_ranks = 1
        self.late = 0

    def set_ranks(self, running: set[int], missing: int) -> None:
        """Say which ranks are running, and how many have not said hello yet."""
        self._reached = {rank: self._reached.get(rank, -1) for rank in running}
        self._missing_ranks = missing

    def restart_rank(self, rank: int) -> None:
        """A new life of this rank begins: it may go back to an earlier step."""
        self._reached[rank] = -1

    def add(self, rank: int, scalars: Scalars, now: float) -> None:
        """Take one ``log()`` call of a rank. ``now`` is a monotonic time in seconds."""
        step = scalars.step
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
            if len(self._rows) >= WAITING_STEPS:
                self._close(next(iter(self._rows)))
            row = self._rows[step] = _Row(since=now)
        everyone = len(self._reached)
        for name, value in scalars.values.items():
            self._reporters.setdefault(name, set()).add(rank)
            if name in row.written:
                self._write_late(rank, Scalars(step, scalars.time_ns, scalars.scope, {name: value}))
                continue
            waiting = row.names.get(name)
            if waiting is None:
                waiting = row.names[name] = _Waiting(scalars.scope, scalars.time_ns)
            waiting.by_rank[rank] = value
            waiting.time_ns = max(waiting.time_ns, scalars.time_ns)
            complete = len(waiting.by_rank) >= everyone and self._reached.keys() <= waiting.by_rank.keys()
            if complete and not self._missing_ranks:
                self._write(step, name, row.names.pop(name))
                row.written.add(name)

    def tick(self, now: float) -> None:
        """Write the steps that every running rank has left behind, or that have waited too long."""
        reached = -1 if self._missing_ranks else min(self._reached.values(), default=math.inf)
        deadline = now - (JOIN_DEADLINE_S if self._missing_ranks else DEADLINE_S)
        for step in sorted(step for step, row in self._rows.items() if step < reached or row.since <= deadline):
            self._close(step)

    def flush(self) -> None:
        """Write everything that waits: the run ends."""
        for step in sorted(self._rows):
            self._close(step)

    def _close(self, step: int) -> None:
        for name, waiting in self._rows.pop(step).names.items():
            self._write(step, name, waiting)
        self._closed[step] = None
        if len(self._closed) > CLOSED_STEPS_KEPT:
            self._closed.popitem(last=False)

    def _write(self, step: int, name: str, waiting: _Waiting) -> None:
        by_rank = waiting.by_rank
        alone = len(self._reporters[name]) == 1
        if alone and waiting.scope == USER:
            self._emit(step, waiting.time_ns, {name: next(iter(by_rank.values()))})
            return
        values = {f"rank/{rank}/{name}": value for rank, value in sorted(by_rank.items()) if rank < self._rank_series}
        if not alone:
            reduced = over_ranks(by_rank)
            if waiting.scope == USER:
                values[name] = reduced["mean"]
            values.update((f"ranks/{name}/{what}", value) for what, value in reduced.items())
        if values:
            self._emit(step, waiting.time_ns, values)

    def _write_late(self, rank: int, scalars: Scalars) -> None:
        for name, value in scalars.values.items():
            reporters = self._reporters.setdefault(name, set())
            reporters.add(rank)
            if reporters == {rank} and scalars.scope != RANK:
                # Nobody else logs this name, so nothing was reduced without it.
                self._emit(scalars.step, scalars.time_ns, {name: value})
                continue
            self.late += 1
            if rank < self._rank_series:
                self._emit(scalars.step, scalars.time_ns, {f"rank/{rank}/{name}": value})


def over_ranks(by_rank: dict[int, float]) -> dict[str, float]:
    """Mean, min, max, p95 (nearest rank) and the rank of the maximum, over the finite values.

    ``nonfinite`` counts the ranks that reported NaN or infinity, where there are any.
    """
    finite = sorted((value, -rank) for rank, value in by_rank.items() if math.isfinite(value))
    bad = len(by_rank) - len(finite)
    if not finite:
        return {"mean": math.nan, "nonfinite": float(bad)}
    count = len(finite)
    reduced = {
        "mean": sum(value / count for value, _ in finite),
        "min": finite[0][0],
        "max": finite[-1][0],
        "p95": finite[math.ceil(0.95 * count) - 1][0],
        "argmax": float(-finite[-1][1]),
    }
    if bad:
        reduced["nonfinite"] = float(bad)
    return reduced
