"""From a run's entries to the rows that SwanLab gets: the same function for a live run, for one that is recovered after
its writer was killed, and for one that is uploaded later.

Time is what the entries say, never the clock, so the same entries always give the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from swanlab_ray.actors.aggregate import Aggregator
from swanlab_ray.actors.batches import undecodable
from swanlab_ray.actors.completions import TABLE, CompletionBuffer, CompletionRow
from swanlab_ray.actors.history import Sequence
from swanlab_ray.actors.protocol import (
    Completions,
    Config,
    Event,
    Progress,
    Scalars,
    Spans,
    Tokenizer,
    Undecodable,
    decode_batch,
)
from swanlab_ray.actors.records import Arrived, Batch, Ended, Entry, Finished, Returned, Tick
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.supersession import Supersession
from swanlab_ray.actors.tables import Decoder, Table, table
from swanlab_ray.actors.timings import Timings

TICK_S = 0.2


class Output(Protocol):
    """Where the rows go."""

    def write(self, step: int, time_ns: int, values: dict[str, float], table: Table | None = None) -> None:
        """Take a row; a table of completions comes as a row of its own."""

    def config(self, values: dict[str, Any]) -> None:
        """Take an update of the run's configuration."""


class Reduction:
    """Reduces a run over its ranks.

    Args:
        output: takes each row.
        settings: of the run: which series and tables there are.
        superseded: what later lives have replaced, where that is known beforehand.
        notice: takes a sentence for the user.
    """

    def __init__(
        self,
        output: Output,
        settings: ObserverSettings,
        superseded: Supersession | None = None,
        notice: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self._output = output
        self._aggregator = Aggregator(output.write, settings.rank_series)
        self._superseded = superseded
        self._notice = notice
        self._decoder = Decoder(notice)
        self._characters = settings.completion_max_chars
        self.completions = CompletionBuffer(
            settings.completion_max_buffer, settings.completion_log_interval, self._write_table
        )
        self.timings = Timings(output.write, notice)
        self._sequence = Sequence()
        self._lives: dict[int, str] = {}
        self._running: set[int] = set()
        self._arrived: set[int] = set()
        self._again: set[int] = set()  # ranks whose present life has not logged yet
        self._world_size = 0
        self._next_tick = 0.0
        self.unread = 0
        """Batches that cannot be decoded."""
        self.rewound = False
        """A later life has logged steps again that an earlier one had logged."""

    @property
    def late(self) -> int:
        """Values that came after their step was written."""
        return self._aggregator.late + self.timings.late

    @property
    def waiting(self) -> bool:
        """Whether values wait for ranks that are silent about them."""
        return self._aggregator.waiting or self.completions.due or self.timings.waiting

    def take(self, entry: Entry, events: list[Event] | None = None) -> None:
        """Take the next entry. ``events`` are a batch's, where they are decoded already."""
        match entry:
            case Batch():
                if self._sequence.take(entry):
                    self._take_batch(entry, self._events_of(entry) if events is None else events)
            case Arrived():
                self._arrive(entry)
            case Ended():
                if self._lives.get(entry.rank) == entry.life:
                    self._end_spans(entry.rank, entry.time_ns / 1e9)
                    self._running.discard(entry.rank)
                    self._members_changed()
            case Returned():
                if self._lives.get(entry.rank) == entry.life:
                    self._running.add(entry.rank)
                    self._members_changed()
            case Tick():
                self._tick(entry.time_ns / 1e9)
            case Finished():
                self.flush()
                self._running.clear()
                self._arrived.clear()

    def flush(self) -> None:
        """Write what still waits: there are no more entries."""
        for rank in self._lives:
            self._end_spans(rank, 0.0)
        self.timings.flush()
        self._aggregator.flush()
        self.completions.flush()

    def _tick(self, now: float) -> None:
        self._aggregator.tick(now)
        self.timings.tick(now)
        self.completions.tick(now)

    def _events_of(self, batch: Batch) -> list[Event]:
        try:
            return decode_batch(batch.data)[0]
        except Undecodable as error:
            self.unread += 1
            if self.unread == 1:
                self._notice(f"{undecodable(batch, error)}.")
            return []

    def _take_batch(self, batch: Batch, events: list[Event]) -> None:
        now = batch.received_ns / 1e9
        if batch.rank not in self._arrived and self._lives.get(batch.rank) == batch.life:
            self._arrived.add(batch.rank)
            self._members_changed()
        for event in events:
            match event:
                case Scalars():
                    if batch.rank in self._again or self._superseded is not None:
                        self._take_again(batch, event, now)
                    else:
                        self._aggregator.add(batch.rank, event, now)
                    if self.completions.waiting:
                        self.completions.passed(batch.rank, event.step - 1)
                case Progress():
                    self.completions.passed(batch.rank, event.step)
                    self.timings.passed(batch.rank, event.step)
                case Spans():
                    self.timings.take(batch.rank, event, now, self._standing(batch.rank, batch.life))
                case Completions():
                    self._take_completions(batch, event, now)
                case Tokenizer():
                    self._decoder.learn(event)
                case Config():
                    self._output.config(event.values)
        if now >= self._next_tick:
            self._next_tick = now + TICK_S
            self._tick(now)

    def _take_again(self, batch: Batch, scalars: Scalars, now: float) -> None:
        """A value of a life that is not the only one of its rank, or may not be."""
        self._resumed_at(batch.rank, scalars.step)
        kept = self._superseded.standing(batch.rank, batch.life, scalars) if self._superseded else scalars
        if kept is not None:
            self._aggregator.add(batch.rank, kept, now)

    def _standing(self, rank: int, life: str) -> Callable[[Scalars], Scalars | None]:
        superseded = self._superseded
        return lambda scalars: superseded.standing(rank, life, scalars) if superseded is not None else scalars

    def _end_spans(self, rank: int, now: float) -> None:
        self.timings.end_rank(rank, now, self._standing(rank, self._lives[rank]))

    def _take_completions(self, batch: Batch, event: Completions, now: float) -> None:
        self._resumed_at(batch.rank, event.step)
        if self._superseded is None or self._superseded.stands(batch.rank, batch.life, event.step, TABLE):
            self.completions.add(batch.rank, event, now)

    def _resumed_at(self, rank: int, step: int) -> None:
        """The first that a rank's new life logs says where its training goes on."""
        if rank in self._again:
            self._again.discard(rank)
            self.completions.rewind(rank, step)
            if step <= max(self._aggregator.highest_step, self.completions.highest_step):
                self.rewound = True
                self._aggregator.rewind(step)
                self.timings.rewind(step)

    def _write_table(self, step: int, rows: list[CompletionRow]) -> None:
        made = table(rows, self._decoder.text, self._characters)
        self._output.write(step, rows[-1].time_ns, {}, made)

    def _arrive(self, arrived: Arrived) -> None:
        earlier = self._lives.get(arrived.rank)
        if earlier == arrived.life and arrived.rank in self._running:
            return
        self._lives[arrived.rank] = arrived.life
        if earlier not in (None, arrived.life):
            self._again.add(arrived.rank)
            self._arrived.clear()  # the job may have been started again: who is still there will be heard
        if arrived.world_size != self._world_size:
            self._world_size = arrived.world_size
            # Ranks of a larger world that is gone.
            self._running = {rank for rank in self._running if rank < arrived.world_size}
            self._arrived = {rank for rank in self._arrived if rank < arrived.world_size}
        self._aggregator.restart_rank(arrived.rank)
        self.timings.restart_rank(arrived.rank)
        self._running.add(arrived.rank)
        self._arrived.add(arrived.rank)
        self._members_changed()

    def _members_changed(self) -> None:
        missing = max(0, self._world_size - len(self._arrived))
        self._aggregator.set_ranks(self._running, missing)
        self.timings.set_ranks(self._running, missing)
        self.completions.set_ranks(self._running, missing)
