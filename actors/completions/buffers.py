"""Rows of completions on their way to a table: a bound, fairness among ranks, and when a table is due."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from swanlab_ray.actors.wire.events import Cell, Completions

TABLE = "rlhf_completions"
"""Name of the table in SwanLab."""
PATIENCE_S = 10.0
"""How long a table that is due waits for ranks that have not come as far."""
JOIN_PATIENCE_S = 120.0
"""The same while ranks have not said hello yet; one of them has the tokenizer."""


class CompletionRow(NamedTuple):
    """One sample of one rank."""

    step: int
    rank: int
    time_ns: int
    algorithm: str
    tokenizer: str
    cells: dict[str, Cell]


def rows_of(rank: int, event: Completions) -> Iterator[CompletionRow]:
    """The rows of an event."""
    for values in zip(*event.columns.values(), strict=False):
        cells = dict(zip(event.columns, values, strict=True))
        yield CompletionRow(event.step, rank, event.time_ns, event.algorithm, event.tokenizer, cells)


class CompletionBuffer:
    """Keeps rows until their table is due: every ``interval`` steps, once every rank has come that far.

    Time is that of the entries, so the same entries make the same tables.

    Args:
        size: rows kept at the most.
        interval: steps between two tables.
        emit: takes a table's step and its rows, by step and rank. No two tables have the same step, since SwanLab
            keeps the first one.
    """

    def __init__(self, size: int, interval: int, emit: Callable[[int, list[CompletionRow]], None]) -> None:
        self._size = size
        self._interval = interval
        self._emit = emit
        self._waiting: dict[int, deque[CompletionRow]] = {}
        self._count = 0
        self._ranks: set[int] = set()
        self._missing_ranks = 0
        self._passed: dict[int, int] = {}  # the step up to which a rank has sent everything, while rows wait
        self._due: int | None = None
        self._since = 0.0  # when a row that is due began to wait
        self._now = 0.0
        self._emitted = -1  # step of the latest table
        self.highest_step = -1
        self.taken = 0
        """Rows that came."""
        self.dropped = 0
        """Rows that came, or were left out by their rank, and got into no table since the bound was reached."""

    @property
    def waiting(self) -> bool:
        """Whether rows wait."""
        return self._count > 0

    @property
    def due(self) -> bool:
        """Whether rows wait whose table is due."""
        return self._since > 0

    def add(self, rank: int, event: Completions, now: float) -> None:
        """Take the rows of an event; ``now`` is its time of arrival, in seconds."""
        self._now = now
        self.highest_step = max(self.highest_step, event.step)
        rows = self._waiting.setdefault(rank, deque(maxlen=self._size))
        self.dropped += event.left_out
        self.passed(rank, event.step - 1)
        if self._due is None:
            self._due = event.step
        if self._count + event.rows > self._size:
            self._flush_due(event.step - 1)  # though not all ranks have come that far: these rows would push it out
        for row in rows_of(rank, event):
            if self._count >= self._size:
                self._drop_one()
            rows.append(row)
            self._count += 1
            self.taken += 1
        if event.step >= self._due and not self._since:
            self._since = now

    def _drop_one(self) -> None:
        """Drop the oldest row of the rank that has most of them."""
        fullest = max(self._waiting.values(), key=len)
        fullest.popleft()
        self._count -= 1
        self.dropped += 1

    def passed(self, rank: int, step: int) -> None:
        """This rank has sent everything up to this step."""
        if step > self._passed.get(rank, -1):
            self._passed[rank] = step

    def set_ranks(self, running: set[int], missing: int) -> None:
        """Say which ranks are running, and how many have not said hello yet."""
        self._ranks = set(running)
        self._missing_ranks = missing

    def rewind(self, rank: int, step: int) -> None:
        """A training that was resumed runs again from this step on."""
        self._passed.pop(rank, None)
        rows = self._waiting.get(rank, deque())
        while rows and rows[-1].step >= step:
            rows.pop()
            self._count -= 1
        self._emitted = min(self._emitted, step - 1)
        if self._due is not None:
            self._due = min(self._due, step)
            self._wait_from_now()

    def tick(self, now: float) -> None:
        """Emit the table that is due, if every rank has come that far or has been waited for long enough."""
        self._now = now
        if not self._count or self._due is None:
            return
        patience = JOIN_PATIENCE_S if self._missing_ranks else PATIENCE_S
        late = self._since > 0 and now - self._since > patience
        far = -1 if self._missing_ranks else min((self._passed.get(rank, -1) for rank in self._ranks), default=-1)
        self._flush_due(sys.maxsize if late else far)

    def flush(self) -> None:
        """Emit what waits: there will be no more."""
        self._flush_due(sys.maxsize)
        if self._count:
            self._flush(max(rows[-1].step for rows in self._waiting.values() if rows))
        self._due, self._since = None, 0.0
        self._passed.clear()

    def _flush_due(self, until: int) -> None:
        """Emit what is due up to a step: the same tables whether it came step by step or all at once."""
        for step in sorted({row.step for rows in self._waiting.values() for row in rows}):
            if self._due is not None and self._due <= step <= until:
                self._flush(step)

    def _flush(self, until: int) -> None:
        table: list[CompletionRow] = []
        for rows in self._waiting.values():
            kept = [row for row in rows if row.step > until]
            table += [row for row in rows if row.step <= until]
            rows.clear()
            rows.extend(kept)
        self._count -= len(table)
        self._due = until + self._interval
        self._wait_from_now()
        self._emitted = max(until, self._emitted + 1)
        self._emit(self._emitted, sorted(table, key=lambda row: (row.step, row.rank)))

    def _wait_from_now(self) -> None:
        """Begin to wait anew, if there is something to wait for."""
        assert self._due is not None
        due = any(row.step >= self._due for rows in self._waiting.values() for row in rows)
        self._since = self._now if due else 0.0
