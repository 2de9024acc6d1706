"""What the journal is told of the delivery, for a successor: where SwanLab's run is, and how much of it is there."""

from __future__ import annotations

import time

from swanlab_ray.actors.delivery.sink import Sink
from swanlab_ray.actors.journal.records import REDUCTION_VERSION, Delivered, Opened
from swanlab_ray.actors.journal.writing import Journal

OPENED_S = 2.0
"""How long a run that is opened waits until that is on disk."""
NOTED_S = 1.0
"""Seconds between two notes of how many rows have arrived."""


class DeliveryNotes:
    """Kept by the sink.

    Args:
        journal: takes the notes.
        rows: how many rows SwanLab's cloud has confirmed already.
        run_dirs: directories of the SwanLab runs that were begun already.
    """

    def __init__(self, journal: Journal, rows: int, run_dirs: list[str]) -> None:
        self._journal = journal
        self.run_dirs = run_dirs
        self.rows = self._noted = rows
        self._noted_at = 0.0

    def opened(self, sink: Sink) -> None:
        """SwanLab's run is there; returns when that is on disk."""
        if sink.run_dir:
            self.run_dirs.append(sink.run_dir)
        self._journal.append(Opened(mode=sink.mode, run_dir=sink.run_dir, url=sink.url))
        self._journal.settled(OPENED_S)

    def delivered(self, rows: int) -> None:
        """So many rows have arrived."""
        self.rows = rows
        self.note(now_and_then=True)

    def note(self, now_and_then: bool = False) -> None:
        """Put it into the journal, unless it is there; ``now_and_then``: or was a moment ago."""
        now = time.monotonic()
        if self.rows > self._noted and not (now_and_then and now - self._noted_at <= NOTED_S):
            self._noted, self._noted_at = self.rows, now
            self._journal.append(Delivered(rows=self.rows, reduction_version=REDUCTION_VERSION))
