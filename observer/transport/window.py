"""What was said to the writer: at most :data:`WINDOW` batches under way, and sent again from where it stands
(go-back-N); and a sign of life where there is no batch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from swanlab_ray.actors.wire.messages import BEAT_S, WINDOW, Ack, Sign
from swanlab_ray.observer.transport.batches import Batches, UnderWay
from swanlab_ray.observer.transport.link import CALL_DEADLINE_S, Link, LinkBroken

HOLD_S = 0.2
"""Pause after the writer had no room for a batch."""


@dataclass(slots=True)
class _Call:
    """One that is not answered yet."""

    answer: Any  # a reference to it
    began: float
    sent: UnderWay | None  # None: a mere sign of life


class Window:
    """Sends batches, keeps each until it is on the writer's disk, and hears what the writer answers.

    Args:
        link: to the writer.
        batches: of this rank.
        sign: makes a sign of life.
        away: around what may take long, see :class:`swanlab_ray.observer.transport.last_words.Ownership`.
    """

    def __init__(
        self,
        link: Link,
        batches: Batches,
        sign: Callable[[], Sign],
        away: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._link = link
        self._batches = batches
        self._sign = sign
        self._away = away
        self._calls: deque[_Call] = deque()  # answered in their order
        self._signed = 0.0  # when the writer was called last
        self.held_until = 0.0
        self.under_way: deque[UnderWay] = deque()

    @property
    def first(self) -> int:
        """Number of the oldest batch that this rank can still send."""
        first = self._batches.first
        return min(first, self.under_way[0].batch.seq) if self.under_way else first

    @property
    def asking(self) -> bool:
        """Whether a batch was sent and is not answered yet."""
        return any(call.sent is not None for call in self._calls)

    @property
    def all_taken(self) -> bool:
        """Whether the writer has everything that is under way, but not all of it on disk."""
        return bool(self.under_way) and all(sent.taken for sent in self.under_way)

    def send(self) -> None:
        """Send what there is room for, and again what the writer does not have."""
        while len(self.under_way) < WINDOW and (sent := self._batches.next()) is not None:
            self.under_way.append(sent)
        if time.monotonic() >= self.held_until:
            for sent in self.under_way:
                if not sent.taken and not sent.asked:
                    self._call(sent)

    def give_sign(self, now: bool) -> None:
        """Give a sign of life where no batch did lately; or ``now``, for the sake of its answer, which says what is on
        disk. There is one at a time."""
        due = now or time.monotonic() - self._signed >= BEAT_S
        if due and all(call.sent is not None for call in self._calls):
            self._call(None)

    def _call(self, sent: UnderWay | None) -> None:
        self._signed = time.monotonic()
        sign = self._sign()
        with self._away():
            answer = self._link.ingest(sign, sent.batch if sent else None)
        self._calls.append(_Call(answer, self._signed, sent))
        if sent is not None:
            sent.asked = True

    def answers(self, wait: float) -> Iterator[Ack]:
        """What the writer has answered, to be heeded one by one; each may take ``wait`` seconds.

        Raises:
            LinkBroken: nothing comes any more.
        """
        while self._calls:
            call = self._calls[0]
            with self._away():
                answer = self._link.acknowledged(call.answer, wait)
            if answer is None:
                if time.monotonic() - call.began > CALL_DEADLINE_S:
                    raise LinkBroken(f"The writer has not answered for {CALL_DEADLINE_S:.0f} s.")
                return
            self._calls.popleft()
            if call.sent is not None:
                call.sent.asked, call.sent.taken = False, answer.next_seq > call.sent.batch.seq
                if not call.sent.taken:
                    self.held_until = time.monotonic() + HOLD_S
            yield answer

    def heed(self, answer: Ack) -> bool:
        """Forget what is on disk, and note what a writer does not have that was started again. Returns whether there
        was something to forget."""
        before = len(self.under_way)
        while self.under_way and self.under_way[0].batch.seq < answer.durable:
            self._batches.acknowledged(self.under_way.popleft())
        for sent in self.under_way:
            if sent.batch.seq >= answer.next_seq:
                sent.taken = False
        return len(self.under_way) < before

    def broken(self) -> None:
        """No answer comes over this connection any more."""
        self._calls.clear()
        for sent in self.under_way:
            sent.asked = False

    def welcomed(self, answer: Ack) -> None:
        """Begin again where the writer stands."""
        self.held_until = 0.0
        for sent in self.under_way:
            sent.taken = sent.batch.seq < answer.next_seq
