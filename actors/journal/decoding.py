"""From what is committed to events, in order, on a thread of its own."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

from swanlab_ray.actors.journal.records import Batch, Entry
from swanlab_ray.actors.journal.writing import Committed, Position
from swanlab_ray.actors.log import log
from swanlab_ray.actors.wire.codec import Rejected, decode_batch
from swanlab_ray.actors.wire.events import Event

Look = Callable[[Batch, list[Event], list[Rejected]], None]


class Decoded(NamedTuple):
    """An entry that is on disk."""

    entry: Entry
    events: list[Event] | None
    """Of a batch, if it can be decoded."""
    position: Position
    """After it."""


class Decoding:
    """Decodes what is committed and passes it on.

    Args:
        look: is shown each batch.
        forward: takes everything.
    """

    def __init__(self, look: Look, forward: Callable[[Decoded], None]) -> None:
        self._look = look
        self._forward = forward
        self._queue: SimpleQueue[tuple[float, Committed] | threading.Event] = SimpleQueue()
        self._oldest: float | None = None
        self._counting = threading.Lock()
        self.backlog = 0
        """Bytes of batches that wait here."""
        threading.Thread(target=self._work, name="decoding", daemon=True).start()

    def put(self, committed: list[Committed]) -> None:
        """Queue entries. Never blocks."""
        now = time.monotonic()
        with self._counting:
            self.backlog += sum(len(entry.data) for entry, _ in committed if isinstance(entry, Batch))
        for one in committed:
            self._queue.put((now, one))

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
            self._oldest, (entry, position) = item
            try:
                self._forward(Decoded(entry, self._events(entry), position))
            except Exception:
                log(traceback.format_exc())

    def _events(self, entry: Entry) -> list[Event] | None:
        if not isinstance(entry, Batch):
            return None
        with self._counting:
            self.backlog -= len(entry.data)
        try:
            events, rejected = decode_batch(entry.data)
        except Exception:
            log(traceback.format_exc())
            return None
        try:
            self._look(entry, events, rejected)
        except Exception:
            log(traceback.format_exc())
        return events
