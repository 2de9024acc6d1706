"""Which batches are on disk: what this writer has committed, and what it finds of earlier incarnations."""

from __future__ import annotations

import time
from pathlib import Path

from swanlab_ray.actors.journal.records import Batch
from swanlab_ray.actors.journal.seen import LifeKey, Sequence
from swanlab_ray.actors.journal.writing import Journal
from swanlab_ray.actors.runs.summary import Summary, summarise
from swanlab_ray.actors.wire.messages import Hello

AGAIN_S = 10.0
"""Pause after files could not be read."""


class OnDisk:
    """The batches of a run that are on disk, so that a rank is told to forget no other.

    Args:
        journal: of this incarnation.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._sequence = Sequence()
        self._earlier: dict[LifeKey, int] = {}  # events of a life in earlier files
        self._here: dict[LifeKey, int] = {}  # and that this incarnation has committed besides
        self._sizes: dict[Path, int] | None = None
        self._failed = 0.0
        self.readable = True
        """The earlier files could be read."""
        self._durable = True

    def read(self) -> Summary | None:
        """Read the files of earlier incarnations, and sync them: what was only written when their writer died is on no
        disk yet. None: they are as they were, or could not be read a moment ago.

        Raises:
            OSError, UnknownFormat: they cannot be read.
        """
        paths = self._journal.earlier_files()
        sizes = {path: path.stat().st_size for path in paths}
        if sizes == self._sizes or (self._failed and time.monotonic() - self._failed < AGAIN_S):
            return None
        self.readable = False
        self._failed = time.monotonic()
        summary = summarise(paths)
        try:
            self._journal.make_durable(paths)
            self._durable = True
        except OSError:  # then each rank sends again what it was not told of: that is never wrong
            self._durable = False
        self.readable, self._failed, self._sizes = True, 0.0, sizes
        return summary

    def join(self, summary: Summary) -> None:
        """Take in what was read."""
        self._earlier = {key: life.events for key, life in summary.lives.items()}
        for key, numbers in summary.seen.lives.items():
            self._sequence.of(key).join(numbers)

    def take(self, batch: Batch) -> None:
        """A batch was committed."""
        if self._sequence.take(batch):
            key = batch.rank, batch.life
            self._here[key] = self._here.get(key, 0) + batch.events

    def events(self, life: LifeKey) -> int:
        """Of a life, each batch counted once."""
        return self._earlier.get(life, 0) + self._here.get(life, 0)

    def next(self, life: LifeKey) -> int:
        """One more than the highest number of a life's batches."""
        return self._sequence.of(life).next

    def due(self, hello: Hello) -> int:
        """The first batch to be sent: all below it that the rank still holds are on disk, without a gap."""
        numbers = self._sequence.of((hello.rank, hello.life))
        return numbers.missing_from(hello.next_seq) if self._durable else hello.next_seq
