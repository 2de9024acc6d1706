"""Where rows go: a queue with a bound, and the thread that works it off.

What SwanLab makes of them is for the kinds: :class:`swanlab_ray.actors.delivery.disk.SwanLabRun` on disk,
:class:`swanlab_ray.actors.delivery.cloud.CloudRun` in its cloud.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from swanlab_ray.actors.completions.tables import Table
from swanlab_ray.actors.log import log
from swanlab_ray.actors.swanlab.limits import HIGHEST_STEP, Limits, fit_time
from swanlab_ray.actors.wire.events import State
from swanlab_ray.actors.wire.text import brief

QUEUE_BYTES = 20 << 20
"""Bytes of rows that may wait here."""
SCALAR_BYTES = 100
"""What a scalar of a row takes in memory, with its share of the names."""
FINISH_DEADLINE_S = 60.0
"""How long the end of a run may take; SwanLab itself has no limit when its server is down."""


class Row(NamedTuple):
    """Values at a step, or a table of completions; ``time_ns`` is their original Unix time in nanoseconds."""

    step: int
    time_ns: int
    values: dict[str, float]
    table: Table | None = None

    @property
    def size(self) -> int:
        """Bytes that it takes in memory, about."""
        text = sum(len(cell) for row in self.table.rows for cell in row if isinstance(cell, str)) if self.table else 0
        return SCALAR_BYTES * len(self.values) + text


class Sink:
    """Takes rows and hands them to SwanLab from a thread of its own.

    Args:
        mode: the mode of the run.
        notice: takes a sentence for the user.
        on_open: called once it is known where SwanLab's run is.
        limits: fits rows to what SwanLab takes.
    """

    waits = True
    """A full queue makes :meth:`write` wait (the journal has what comes later); otherwise rows are thinned."""

    def __init__(
        self,
        mode: str,
        notice: Callable[[str], None],
        on_open: Callable[[Sink], None],
        limits: Limits | None = None,
    ) -> None:
        self.mode = mode
        self.run_dir: str | None = None
        self.url: str | None = None
        self.written = 0
        """Scalars that SwanLab has: its cloud has confirmed them, or they are in its run's file."""
        self.thinned = 0
        """Scalars that it could not take in time."""
        self.withheld = 0
        """Scalars that it does not take: for their names or steps, NaN on its local dashboard, steps it has already."""
        self.completions_lost = 0
        """Rows of completion tables that SwanLab did not get."""
        self.complete = True
        """SwanLab has, or can still get, every row."""
        self.closed = threading.Event()
        self.notice = notice
        self._limits = limits or Limits(notice)
        self._on_open = on_open
        self._rows: deque[Row] = deque()
        self._configs: deque[dict[str, Any]] = deque()
        self._waiting = 0  # bytes of _rows
        self._room = threading.Condition()
        self._failed = self._excused = False
        self._wake = threading.Event()
        self._end: tuple[State, str | None] | None = None
        self._stopped = False
        self._drain_until = math.inf  # monotonic
        self._thread = threading.Thread(target=self._work, name="swanlab-sink", daemon=True)

    def start(self) -> None:
        """Open SwanLab's run and begin to work off what is queued, where that was not done."""
        if self._thread.ident is None:
            self._thread.start()

    def write(self, step: int, time_ns: int, values: dict[str, float], table: Table | None = None) -> None:
        """Queue a row. Where the queue is full this waits, or thins."""
        row = self._fit(step, time_ns, values, table)
        with self._room:
            while self._waiting > QUEUE_BYTES and self._patient and not self._failed and self.left() > 0:
                self._room.wait(min(1.0, self.left()))
            if self._failed:
                self._lose(row)
                return
            self._queue(row)

    def config(self, values: dict[str, Any]) -> None:
        """Queue an update of the run's configuration."""
        self._configs.append(values)

    def lag(self) -> float:
        """Seconds since the oldest row that SwanLab has not got yet was logged."""
        try:
            return max(0.0, time.time() - self._rows[0].time_ns / 1e9)
        except IndexError:
            return 0.0

    def hurry(self, left: float = math.inf) -> None:
        """The run is ending: what takes longer than :data:`FINISH_DEADLINE_S` from now on, or than the seconds that are
        ``left``, is given up.
        """
        self._drain_until = min(self._drain_until, time.monotonic() + min(left, self._patience()))

    def finish(self, state: State, error: str | None) -> None:
        """Write what is queued and close the run; ``closed`` is set when that is done or given up."""
        self.hurry()
        self._end = (state, error)
        self._wake.set()

    def stop(self) -> None:
        """Take nothing more and leave SwanLab's run as it is."""
        self._stopped = True
        self._drain_until = -math.inf
        self._wake.set()
        if not self._thread.is_alive():  # it never began
            self.closed.set()

    # What the kinds fill in, all called on the sink's thread.

    def _open(self) -> None:
        """Open SwanLab's run, and call ``on_open``."""
        self._on_open(self)

    def _update_config(self, values: dict[str, Any]) -> None: ...

    def _write_some(self, first: Row) -> None:
        """Hand over the oldest rows, of which this is the first, then :meth:`_forget` them."""

    def _close(self, state: State, error: str | None) -> None: ...

    def _patience(self) -> float:
        return FINISH_DEADLINE_S

    def _closing(self) -> float:
        """Seconds of the end's deadline that closing the run may take."""
        return 0.0

    @property
    def _patient(self) -> bool:
        """Whether a row waits for room now."""
        return self.waits

    def _queue(self, row: Row) -> None:
        """Take a row. The queue's lock is held."""
        if self._waiting > QUEUE_BYTES:
            self._lose(row)
            return
        self._waiting += row.size
        self._rows.append(row)

    # Their tools.

    def left(self) -> float:
        """Seconds until the deadline of the end."""
        return self._drain_until - time.monotonic()

    def _fit(self, step: int, time_ns: int, values: dict[str, float], table: Table | None) -> Row:
        """What SwanLab takes of a row; the rest is counted."""
        fitted = self._limits.fit(step, values)
        self.withheld += len(values) - len(fitted)
        if table is not None and step > HIGHEST_STEP:
            self.completions_lost += len(table.rows)
            table = None
        return Row(step, fit_time(time_ns), fitted, table)

    def _first(self) -> Row | None:
        """The oldest row, which stays that until it is forgotten; those behind it may be thinned meanwhile."""
        with self._room:
            return self._rows[0] if self._rows else None

    def _forget(self, rows: int) -> None:
        """The oldest rows are dealt with."""
        with self._room:
            for _ in range(rows):
                self._waiting -= self._rows.popleft().size
            self._room.notify_all()

    def _lose(self, row: Row) -> None:
        """Count a row that SwanLab does not get."""
        self.thinned += len(row.values)
        self.completions_lost += len(row.table.rows) if row.table is not None else 0

    def _work(self) -> None:
        try:
            if not self._stopped:
                self._open()
            while self._end is None and not self._stopped:
                self._write_queued()
                self._wake.wait(0.1)
            self._write_queued()
            if self._end is not None:
                self._close(*self._end)
        except GaveUp:
            self.complete = False
        except Exception as error:  # the writer must go on answering the ranks
            self.complete = False
            reason = str(error) if isinstance(error, Stopped) else brief(error)
            self.notice(f"SwanLab stopped taking data: {reason}. The rest of this run is in the journal only.")
            self._fail()
            self._wake.wait()  # for the end
            with suppress(Exception):
                if self._end is not None:
                    self._close(*self._end)
        finally:
            self._fail()
            self.closed.set()

    def _write_queued(self) -> None:
        while self._configs:
            try:
                self._update_config(self._configs[0])
            except (GaveUp, Stopped):
                raise
            except Exception as error:
                self._excuse("the run's configuration", error)
            self._configs.popleft()
        while (row := self._first()) is not None:
            if self.left() <= self._closing():
                self.complete = False
                return
            try:
                self._write_some(row)
            except (GaveUp, Stopped):
                raise
            except Exception as error:  # of this row alone, as far as anybody knows
                self._excuse(f"what was logged at step {row.step}", error)
                if self._first() is row:
                    self._withhold(row)
                    self._forget(1)

    def _excuse(self, what: str, error: Exception) -> None:
        self.complete = False
        log("".join(traceback.format_exception(error)))
        if not self._excused:
            self._excused = True
            self.notice(f"SwanLab did not take {what} ({brief(error)}); the journal has it, the rest goes on.")

    def _withhold(self, row: Row) -> None:
        """Count a row that SwanLab does not take."""
        self.withheld += len(row.values)
        self.completions_lost += len(row.table.rows) if row.table is not None else 0

    def _fail(self) -> None:
        with self._room:
            self._failed = True
            self._waiting = 0
            while self._rows:
                self._lose(self._rows.popleft())
            self._room.notify_all()


class Stopped(Exception):
    """SwanLab takes nothing more in this process."""


class GaveUp(Exception):
    """The end's deadline has passed before SwanLab could be opened or had everything."""
