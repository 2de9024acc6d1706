"""From a run's entries to the rows that SwanLab gets: the same function for a live run, for one that is recovered after
its writer was killed, and for one that is uploaded later.

Time is what the entries say, never the clock, so the same entries always give the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, Protocol

from swanlab_ray.actors.completions.buffers import TABLE, CompletionBuffer, CompletionRow
from swanlab_ray.actors.completions.tables import Decoder, Table, table
from swanlab_ray.actors.journal.batches import undecodable
from swanlab_ray.actors.journal.records import Arrived, Batch, Ended, Entry, Finished, Returned, Tick
from swanlab_ray.actors.journal.seen import InOrder
from swanlab_ray.actors.reduction.aggregate import Aggregator, Emit, NonFinite
from swanlab_ray.actors.reduction.clock import Clock
from swanlab_ray.actors.reduction.passes import Passes
from swanlab_ray.actors.reduction.spans import STEPS
from swanlab_ray.actors.reduction.supersession import Supersession
from swanlab_ray.actors.reduction.timings import Timings
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.codec import Undecodable, decode_batch
from swanlab_ray.actors.wire.events import Completions, Config, Event, Progress, Scalars, Spans, Tokenizer
from swanlab_ray.actors.wire.status import REPEATED

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
        superseded: what later lives, or a training that went back, have replaced, where that is known beforehand.
        notice: takes a sentence for the user.
        emit_again: takes the rows that replace earlier ones of the same step; by default as any other.
        on_nonfinite: see :class:`Aggregator`.
    """

    def __init__(
        self,
        output: Output,
        settings: ObserverSettings,
        superseded: Supersession | None = None,
        notice: Callable[[str], None] = lambda sentence: None,
        emit_again: Emit | None = None,
        on_nonfinite: NonFinite = lambda rank, name, step, time_ns, value: None,
    ) -> None:
        self._output = output
        self._notice = notice
        self._emit_again = emit_again or output.write
        self._failure: Exception | None = None  # of the output
        self._aggregator = Aggregator(
            self._write, settings.rank_series, self._write_again, self._on_repeated, on_nonfinite
        )
        self._passes = Passes(self._aggregator.logged)
        self._superseded = superseded
        self._decoder = Decoder(notice)
        self._characters = settings.completion_max_chars
        self.completions = CompletionBuffer(
            settings.completion_max_buffer, settings.completion_log_interval, self._write_table
        )
        self.timings = Timings(self._write, notice, self._write_again)
        self._order: InOrder[tuple[Entry, list[Event] | None]] = InOrder()
        self._clock = Clock()
        self._lives: dict[int, str] = {}
        self._passed_lives: dict[int, str] = {}  # the same, with the passes of a training that went back kept apart
        self._running: set[int] = set()
        self._arrived: set[int] = set()
        self._left: set[int] = set()  # ranks of a job that is over, unless one of them comes back
        self._again: set[int] = set()  # ranks whose present life has not logged yet
        self._logged_to: dict[int, int] = {}  # the highest step of each rank: of completions, and of earlier lives
        self._world_size = 0
        self._next_tick = 0.0
        self._refused: set[str] = set()
        self._told_repeated = False
        self.unread = 0
        """Batches that cannot be decoded."""
        self.rewound = False
        """Steps were logged again, by a later life or a training that went back."""
        self.refused = 0
        """Events that could not be worked off."""

    @property
    def late(self) -> int:
        """Values that came after their step was written."""
        return self._aggregator.late + self.timings.late

    @property
    def repeated(self) -> int:
        """Values of a rank for a name at a step that it had logged before."""
        return self._aggregator.repeated + self.timings.repeated

    @property
    def waiting(self) -> bool:
        """Whether values wait for ranks that are silent about them."""
        return self._aggregator.waiting or self.completions.due or self.timings.waiting

    def take(self, entry: Entry, events: list[Event] | None = None) -> None:
        """Take the next entry. ``events`` are a batch's, where they are decoded already."""
        for ready in self._order.take(entry, (entry, events)):
            self._take(*ready)

    def _take(self, entry: Entry, events: list[Event] | None) -> None:
        match entry:
            case Batch():
                self._take_batch(entry, self._events_of(entry) if events is None else events)
            case Arrived():
                self._arrive(entry)
            case Ended():
                if self._lives.get(entry.rank) == entry.life:
                    self._end_spans(entry.rank, self._clock.read(entry.time_ns))
                    self._running.discard(entry.rank)
                    self._members_changed()
            case Returned():
                if self._lives.get(entry.rank) == entry.life:
                    self._running.add(entry.rank)
                    self._arrived |= self._left
                    self._members_changed()
            case Tick():
                self._tick(self._clock.read(entry.time_ns))
            case Finished():
                self.flush()
                self._running.clear()
                self._left, self._arrived = self._arrived, set()

    def flush(self) -> None:
        """Write what still waits: there are no more entries."""
        for ready in self._order.rest():
            self._take(*ready)
        for rank in self._lives:
            self._end_spans(rank, self._clock.now)
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
        now = self._clock.read(batch.received_ns)
        if batch.rank not in self._arrived and self._lives.get(batch.rank) == batch.life:
            self._arrived.add(batch.rank)
            self._members_changed()
        if self._superseded is None:
            self._take_events(batch, batch.life, events, now)
        else:
            for turn, (life, part) in enumerate(self._superseded.parts(batch, events)):
                if turn:
                    self._end_spans(batch.rank, now)
                if batch.life == self._lives.get(batch.rank):
                    self._passed_lives[batch.rank] = life
                self._take_events(batch, life, part, now)
        if now >= self._next_tick:
            self._next_tick = now + TICK_S
            self._tick(now)

    def _take_events(self, batch: Batch, life: str, events: list[Event], now: float) -> None:
        """Take events one after the other; one that cannot be worked off costs none of the others."""
        left = iter(events)
        highest = self._passes.highest
        rank = batch.rank
        while True:
            try:
                for event in left:
                    match event:
                        case Scalars():
                            step = event.step
                            if rank in self._again or self._superseded is not None:
                                self._take_again(rank, life, event, now)
                            else:
                                if step > highest.get(rank, inf):
                                    highest[rank] = step
                                elif self._passes.goes_back(rank, event):
                                    self._go_back(rank, step, now)
                                self._aggregator.add(rank, event, now)
                            if self.completions.waiting:
                                self.completions.passed(rank, step - 1)
                        case Progress():
                            self._take_progress(rank, event, now)
                        case Spans():
                            self.timings.take(rank, event, now, self._standing(rank, life))
                        case Completions():
                            self._take_completions(rank, life, event, now)
                        case Tokenizer():
                            self._decoder.learn(event)
                        case Config():
                            self._output.config(event.values)
                return
            except Exception as error:
                if error is self._failure:
                    raise  # it is not the event's
                self._refuse(rank, _described(event), error)

    def _refuse(self, rank: int, what: str, error: Exception) -> None:
        """Count what could not be worked off, and say so once for each kind of it."""
        self.refused += 1
        if what not in self._refused and len(self._refused) < 100:
            self._refused.add(what)
            self._notice(f"{what} of rank {rank} is not in SwanLab: {type(error).__name__}: {str(error)[:200]}.")

    def _on_repeated(self, rank: int, name: str, step: int) -> None:
        if not self._told_repeated:
            self._told_repeated = True
            self._notice(
                f"{REPEATED}rank {rank} has logged {name!r} at step {step} before. The first value stands, and the "
                "journal has all of them: let the steps count on, over epochs too."
            )

    def _take_again(self, rank: int, life: str, scalars: Scalars, now: float) -> None:
        """A value of a life that is not the only one of its rank, or may not be."""
        self._resumed_at(rank, scalars.step)
        if self._superseded is None:
            self._passes.goes_back(rank, scalars)
        kept = self._superseded.standing(rank, life, scalars) if self._superseded else scalars
        if kept is not None:
            self._aggregator.add(rank, kept, now)

    def _take_progress(self, rank: int, progress: Progress, now: float) -> None:
        if not 0 <= progress.step < STEPS:
            raise ValueError(f"step {progress.step} is not from 0 to 2**63 - 1")
        if self._superseded is None and self._passes.says_it_is_at(rank, progress.step):
            self._go_back(rank, progress.step + 1, now)
        self.completions.passed(rank, progress.step)
        self.timings.passed(rank, progress.step)

    def _go_back(self, rank: int, step: int, now: float) -> None:
        """The training of a rank goes back, in the life that it is in, and runs its steps from this one on again."""
        self._end_spans(rank, now)
        self.rewound = True
        self.completions.rewind(rank, step)
        self._aggregator.rewind(rank, step)
        self.timings.rewind(rank, step)

    def _standing(self, rank: int, life: str) -> Callable[[Scalars], Scalars | None]:
        superseded = self._superseded
        return lambda scalars: superseded.standing(rank, life, scalars) if superseded is not None else scalars

    def _end_spans(self, rank: int, now: float) -> None:
        life = self._passed_lives.get(rank) or self._lives.get(rank, "")
        self.timings.end_rank(rank, now, self._standing(rank, life))

    def _take_completions(self, rank: int, life: str, event: Completions, now: float) -> None:
        self._resumed_at(rank, event.step)
        self._logged_to[rank] = max(event.step, self._logged_to.get(rank, -1))
        if self._superseded is None or self._superseded.stands(rank, life, event.step, TABLE):
            self.completions.add(rank, event, now)

    def _resumed_at(self, rank: int, step: int) -> None:
        """The first that a rank's new life logs says where its training goes on."""
        if rank in self._again:
            self._again.discard(rank)
            self.completions.rewind(rank, step)
            if step <= self._logged_to.get(rank, -1):
                self.rewound = True
            if step <= max(self._aggregator.highest_step, self.completions.highest_step):  # of any rank
                self._aggregator.rewind(rank, step)
                self.timings.rewind(rank, step)

    def _write(self, step: int, time_ns: int, values: dict[str, float], table: Table | None = None) -> None:
        try:
            self._output.write(step, time_ns, values, table)
        except Exception as error:
            self._failure = error
            raise

    def _write_again(self, step: int, time_ns: int, values: dict[str, float]) -> None:
        try:
            self._emit_again(step, time_ns, values)
        except Exception as error:
            self._failure = error
            raise

    def _write_table(self, step: int, rows: list[CompletionRow]) -> None:
        made = table(rows, self._decoder.text, self._characters)
        self._write(step, rows[-1].time_ns, {}, made)

    def _arrive(self, arrived: Arrived) -> None:
        earlier = self._lives.get(arrived.rank)
        if earlier == arrived.life and arrived.rank in self._running:
            return
        self._left = set()
        self._lives[arrived.rank] = arrived.life
        self._passed_lives.pop(arrived.rank, None)
        highest = self._passes.highest.get(arrived.rank, -1)
        self._logged_to[arrived.rank] = max(highest, self._logged_to.get(arrived.rank, -1))
        self._passes.restart_rank(arrived.rank)
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


def _described(event: Event) -> str:
    if isinstance(event, Scalars):
        return f"What was logged as {', '.join(map(repr, list(event.values)[:3]))}"
    return f"An event ({type(event).__name__})"
