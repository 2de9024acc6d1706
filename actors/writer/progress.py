"""What the ranks' own events say about them: for the status, and for how a rank ended that is not heard any more."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

from swanlab_ray.actors.delivery.queue import stderr
from swanlab_ray.actors.journal.records import Batch, Entry
from swanlab_ray.actors.journal.writing import Position
from swanlab_ray.actors.wire.codec import decode_batch
from swanlab_ray.actors.wire.events import JOB, RANK, Event, Outcome, Progress, Scalars, Stacks

LEARNING_RATES = {"learning_rate", "train/learning_rate", "lr"}

REJECTED = 1000
"""Names of values that are not logged, of which each is told; the rest is counted."""

Forward = Callable[[Entry, "list[Event] | None", Position], None]


@dataclass(slots=True)
class RankView:
    """What the events of one life of a rank say about it."""

    life: str
    step: int | None = None
    loss: float | None = None
    own_loss: bool = False
    """``loss`` is the rank's own, not one reduced over ranks."""
    step_time: float | None = None
    outcome: Outcome | None = None
    notices: list[str] = field(default_factory=list)
    """Sentences for the user of this rank that were not sent to it yet."""
    told: list[str] = field(default_factory=list)
    """Those that were: an answer may be lost, so it hears them again with the answer to its goodbye."""


class Views:
    """Decodes what is committed, in order, looks at it, and passes it on.

    Args:
        forward: ``forward(entry, events, position)`` takes everything, with a batch's events decoded.
        on_stacks: ``on_stacks(rank, life, stacks)`` takes where a rank stands.
    """

    def __init__(self, forward: Forward, on_stacks: Callable[[int, str, Stacks], None]) -> None:
        self.ranks: dict[int, RankView] = {}
        self.job = Progress(0, 0)
        self.loss: float | None = None
        """The job's latest loss: the Trainer's or the user's."""
        self.learning_rate: float | None = None
        self.rejected = 0
        self._forward = forward
        self._on_stacks = on_stacks
        self._rejected_keys: set[tuple[str, str]] = set()
        self._queue: SimpleQueue[tuple[float, Entry, Position] | threading.Event] = SimpleQueue()
        self._oldest: float | None = None
        self._counting = threading.Lock()
        self.backlog = 0
        """Bytes of batches that wait here."""
        threading.Thread(target=self._work, name="views", daemon=True).start()

    def put(self, committed: list[tuple[Entry, Position]]) -> None:
        """Queue entries. Never blocks."""
        now = time.monotonic()
        with self._counting:
            self.backlog += sum(len(entry.data) for entry, _ in committed if isinstance(entry, Batch))
        for entry, position in committed:
            self._queue.put((now, entry, position))

    def restart_rank(self, rank: int, life: str) -> RankView:
        """A rank's new life begins."""
        view = self.ranks[rank] = RankView(life)
        return view

    def behind(self) -> float:
        """Seconds since the oldest of what waits here was committed."""
        oldest = self._oldest
        return time.monotonic() - oldest if oldest is not None else 0.0

    def settled(self, timeout: float) -> bool:
        """Wait until all that is queued now was looked at."""
        done = threading.Event()
        self._queue.put(done)
        return done.wait(timeout)

    def _work(self) -> None:
        while True:
            if self._queue.empty():
                self._oldest = None
            item = self._queue.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            self._oldest, entry, position = item
            events = None
            if isinstance(entry, Batch):
                with self._counting:
                    self.backlog -= len(entry.data)
                try:
                    events = self._look(entry)
                except Exception:
                    stderr(traceback.format_exc())
            try:
                self._forward(entry, events, position)
            except Exception:
                stderr(traceback.format_exc())

    def _look(self, batch: Batch) -> list[Event]:
        events, rejected = decode_batch(batch.data)
        view = self.ranks.get(batch.rank)
        if view is None or view.life != batch.life:
            return events  # of a life that is over
        for bad in rejected:
            # Of names one sentence each; of whole events, which have none, one for each reason.
            key = (bad.key, bad.reason if bad.whole else "")
            if key in self._rejected_keys or len(self._rejected_keys) > REJECTED:
                continue
            self._rejected_keys.add(key)
            more = f"More than {REJECTED} names are not logged; the rest of them are counted, and not told."
            view.notices.append(bad.sentence if len(self._rejected_keys) <= REJECTED else more)
        self.rejected += len(rejected)
        for event in events:
            match event:
                case Scalars():
                    self._look_at(batch.rank, view, event)
                case Progress():
                    view.step = event.step
                    if event.step >= self.job.step or event.max_steps != self.job.max_steps:
                        self.job = event
                case Outcome():
                    view.outcome = event
                case Stacks():
                    self._on_stacks(batch.rank, batch.life, event)
        return events

    def _look_at(self, rank: int, view: RankView, scalars: Scalars) -> None:
        """Keep the latest step, loss and step time for the status."""
        if view.step is None or scalars.step > view.step:
            view.step = scalars.step
        values = scalars.values
        loss = values.get("loss", values.get("train/loss"))
        if loss is not None:
            if scalars.scope != JOB:
                view.loss, view.own_loss = loss, True
            elif not view.own_loss:
                view.loss = loss
            if scalars.scope != RANK and rank == 0:
                self.loss = loss
        for name in LEARNING_RATES & values.keys():
            self.learning_rate = values[name]
        if "step_time" in values:
            view.step_time = values["step_time"]
