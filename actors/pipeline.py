"""From acknowledged batches to the SwanLab run: decode, look, reduce over ranks, write; in order, on one thread.

Ranks get their acknowledgement before this, so a burst costs them nothing. What they do to the membership (arrive, end)
passes through the same queue, so that a rank's last values are reduced before it counts as gone.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue

from swanlab_ray.actors.aggregate import Aggregator
from swanlab_ray.actors.protocol import JOB, RANK, Config, Outcome, Progress, Scalars, State, count_events, decode_batch
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.swanlab_run import SwanLabRun, stderr

BACKLOG_BYTES = 256 << 20
"""Batches that may wait here; what comes beyond that is dropped and counted."""
TICK_S = 0.2


@dataclass(slots=True)
class RankView:
    """What a rank's own events say about it."""

    received: int = 0
    step: int | None = None
    loss: float | None = None
    own_loss: bool = False
    """``loss`` is the rank's own, not one reduced over ranks."""
    step_time: float | None = None
    outcome: Outcome | None = None
    notices: list[str] = field(default_factory=list)
    """Sentences for the user of this rank, not delivered yet."""


class Pipeline:
    """Works off what the ranks sent and writes it to the one SwanLab run, which it opens."""

    def __init__(self, settings: ObserverSettings, run_id: str, notices: list[str]) -> None:
        self.run = SwanLabRun(settings, run_id, notices)
        self.notices = notices
        self.ranks: dict[int, RankView] = {}
        self.job = Progress(0, 0)
        self.loss: float | None = None
        """The job's latest loss: the Trainer's or the user's."""
        self.received = 0
        self.rejected = 0
        self.dropped = 0
        self._rejected_keys: set[str] = set()
        self._aggregator = Aggregator(self.run.write, settings.rank_series)
        self._queue: SimpleQueue[tuple[float, int, Callable[[], None]]] = SimpleQueue()
        self._backlog = 0
        self._oldest: float | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="pipeline", daemon=True)
        self._thread.start()

    def put(self, rank: int, batch: bytes) -> None:
        """Queue a batch of a rank. Never blocks."""
        if self._backlog > BACKLOG_BYTES:
            self.dropped += count_events(batch)
            return
        self._submit(partial(self._take, rank, batch), len(batch))

    def set_ranks(self, running: set[int], missing: int) -> None:
        """Queue a change of membership: who is running, and how many have not arrived yet."""
        self._submit(partial(self._aggregator.set_ranks, running, missing))

    def restart_rank(self, rank: int) -> None:
        """Queue the beginning of a rank's new life."""
        self.ranks[rank] = RankView()
        self._submit(partial(self._aggregator.restart_rank, rank))

    def finish(self, state: State, error: str | None) -> None:
        """Queue the end: write what waits and close the run. ``run.closed`` says when that is done."""
        self._submit(partial(self._finish, state, error))

    def settled(self, timeout: float) -> bool:
        """Wait until all that is queued now is worked off."""
        done = threading.Event()
        self._submit(done.set)
        return done.wait(timeout)

    @property
    def backlog(self) -> int:
        """Bytes that wait here."""
        return self._backlog

    @property
    def late(self) -> int:
        """Values that came after their step was written."""
        return self._aggregator.late

    def behind(self) -> float:
        """Seconds since the oldest of what waits here was queued."""
        oldest = self._oldest
        return time.monotonic() - oldest if oldest is not None else 0.0

    def lag(self) -> float:
        """Seconds by which SwanLab is behind what was acknowledged."""
        return max(self.run.lag(), self.behind())

    def _submit(self, work: Callable[[], None], size: int = 0) -> None:
        self._backlog += size
        self._queue.put((time.monotonic(), size, work))

    def _work(self) -> None:
        next_tick = 0.0
        while not self._ended:
            size = 0
            try:
                self._oldest, size, work = self._queue.get(timeout=TICK_S)
                work()
            except Empty:
                pass
            except Exception:
                self._excuse()
            self._backlog -= size
            if self._queue.empty():
                self._oldest = None
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + TICK_S
                try:
                    self._aggregator.tick(now)
                except Exception:
                    self._excuse()

    def _excuse(self) -> None:
        """Say that something could not be worked off; one bad value must not end the run."""
        stderr(traceback.format_exc())
        sentence = "Some values could not be written; see the writer's log."
        if sentence not in self.notices:
            self.notices.append(sentence)

    def _take(self, rank: int, batch: bytes) -> None:
        view = self.ranks[rank]
        events, rejected = decode_batch(batch)
        for bad in rejected:
            if bad.key not in self._rejected_keys and len(self._rejected_keys) < 1000:
                self._rejected_keys.add(bad.key)
                view.notices.append(f"'{bad.key}' is not logged: {bad.reason}; log numbers.")
        self.rejected += len(rejected)
        view.received += len(events)
        self.received += len(events)
        now = time.monotonic()
        for event in events:
            match event:
                case Scalars():
                    self._aggregator.add(rank, event, now)
                    self._look_at(rank, view, event)
                case Progress():
                    view.step = event.step
                    if event.step >= self.job.step or event.max_steps != self.job.max_steps:
                        self.job = event
                case Outcome():
                    view.outcome = event
                case Config():
                    self.run.config(event.values)

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
        if "step_time" in values:
            view.step_time = values["step_time"]

    def _finish(self, state: State, error: str | None) -> None:
        self._aggregator.flush()
        self.run.finish(state, error)
        self._ended = True
