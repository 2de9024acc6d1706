"""Spans: what this rank is doing when. Kept as tuples on the thread that works, put in order by the flusher.

The spans of a thread nest by their times, so nothing is kept while one is open. Only in asyncio tasks, whose spans
overlap, does a context variable know which one is around another.
"""

from __future__ import annotations

import sys
import threading
from asyncio import _get_running_loop
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from threading import get_ident
from time import perf_counter_ns, time_ns
from types import TracebackType
from typing import Any, NamedTuple

from swanlab_ray.actors.wire.events import SPANS
from swanlab_ray.observer.encoding.cells import plain_text
from swanlab_ray.observer.encoding.numbers import Deferred, encode

CAPACITY = 65_536
"""Spans that may wait for the flusher; the oldest go first and are counted."""
SPANS_PER_EVENT = 8_192
SPANS_DEEP = 8
"""Spans within each other that a sign of life names."""
CLOCK_JITTER_NS = 1_000_000
"""Nanoseconds by which Unix time may differ from what it was: spans of two events stay in line."""

inside: ContextVar[int] = ContextVar("swanlab_ray_span", default=0)
"""In an asyncio task, the begin of the innermost span that is open; else 0."""
NO_PARENT = -1

active: SpanLog | None = None
"""Where the spans of this process go; None while no observer is connected."""


class Record(NamedTuple):
    """A span that has ended; times are those of ``perf_counter_ns``."""

    name: str
    step: int
    begin: int
    end: int
    thread: int
    parent: int
    gpu: _CudaTimes | None


class SpanLog:
    """Takes the spans of one rank.

    Args:
        put: takes an event for the writer; never blocks.
        next_step: the step that spans belong to where :attr:`step` is not known.
        cuda: measure spans on the GPU as well.
    """

    def __init__(
        self, put: Callable[[Deferred], None], next_step: Callable[[], int] = lambda: 0, cuda: bool = False
    ) -> None:
        self.step: int | None = None
        """The step under way."""
        self.cuda = cuda
        self.records: deque[tuple[Any, ...]] = deque()
        """Fields of :class:`Record`. Append below :data:`CAPACITY`, else call :meth:`make_room` before; and then
        :meth:`announce`, unless :attr:`announced`."""
        self.announced = False
        """An event that will take what is recorded is on its way."""
        self._recorded = self.records
        self._closed = False
        self._put = put
        self._next_step = next_step
        self._dropped = 0
        self.training_thread = get_ident()
        self.open: Span | None = None
        """The innermost span that is open on the training thread, outside of asyncio tasks."""
        self.ended = 0
        """When the training last got ahead within a step, as far as the spans tell that were sent; by
        ``perf_counter_ns``."""
        self._unix_zero = _unix_zero()

    def announce(self, waits_for: _CudaTimes | None = None) -> None:
        """Put the event that will take what is recorded."""
        self.announced = True
        self._put(Deferred([] if waits_for is None else [waits_for], self._encode, self._event_lost))

    def make_room(self) -> None:
        """Drop the oldest span."""
        with suppress(IndexError):  # the flusher has just taken them
            self.records.popleft()
            self._dropped += 1

    def _event_lost(self) -> None:
        self.announced = self._closed

    def step_now(self) -> int:
        """The step that a span which begins now belongs to."""
        return self.step if self.step is not None else self._next_step()

    def open_names(self) -> str:
        """The spans that are open on the training thread, such as ``evaluate > forward``; for another thread."""
        names: list[str] = []
        span = self.open
        while span is not None and len(names) < SPANS_DEEP:
            names.append(plain_text(_text(span.name)))
            span = span.outer
        return " > ".join(reversed(names))

    def unlink(self, span: Span) -> None:
        """A span has ended that is not the innermost one: of another thread or task, or before one within it."""
        inner = self.open
        while inner is not None:
            if inner.outer is span:
                inner.outer = span.outer
                return
            inner = inner.outer

    def moved(self) -> None:
        """The training got ahead, in a way that no span tells."""
        self.ended = perf_counter_ns()

    def close(self) -> None:
        """Take nothing more; what is recorded is still sent."""
        self._closed = True
        self.records = deque(maxlen=0)
        if self._recorded and not self.announced:
            self.announce()
        self.announced = True

    def _encode(self) -> bytes:
        """The event with what is recorded now; on the flusher's thread."""
        self.announced = self._closed
        dropped, self._dropped = self._dropped, 0
        taken: list[Record] = []
        waits_for = None
        while self._recorded and len(taken) < SPANS_PER_EVENT:
            fields = self._recorded.popleft()
            record = Record(*fields)
            if record.gpu is not None and not record.gpu.ready():
                waits_for = record.gpu
                self._recorded.appendleft(fields)  # their order is that of their ends
                break
            taken.append(record)
            if record.thread == self.training_thread:
                self.ended = record.end
        if self._recorded and (self._closed or not self.announced):
            self.announce(waits_for)
        try:
            return encode(self._event(taken, dropped))
        except Exception:
            self._dropped += dropped + len(taken)
            raise

    def _event(self, records: list[Record], dropped: int) -> tuple[Any, ...]:
        labels = [record.name if type(record.name) is str else _text(record.name) for record in records]
        names = list(dict.fromkeys(labels))
        threads = list(dict.fromkeys([self.training_thread, *(record.thread for record in records)]))
        name_at = {name: index for index, name in enumerate(names)}
        thread_at = {thread: index for index, thread in enumerate(threads)}
        zero = min((record.begin for record in records), default=0)
        unix_zero = _unix_zero()
        if abs(unix_zero - self._unix_zero) > CLOCK_JITTER_NS:  # the clock was set, or has drifted
            self._unix_zero = unix_zero
        return (
            SPANS,
            time_ns(),
            self._unix_zero + zero,
            dropped,
            [plain_text(name) for name in names],
            self._thread_names(threads),
            [thread_at[record.thread] for record in records],
            [name_at[label] for label in labels],
            [record.step for record in records],
            [record.begin - zero for record in records],
            [record.end - record.begin for record in records],
            [record.begin - record.parent if record.parent > 0 else record.parent for record in records]
            if any(record.parent for record in records)
            else [],
            [record.gpu.elapsed_ns() if record.gpu else -1 for record in records]
            if any(record.gpu for record in records)
            else [],
        )

    @staticmethod
    def _thread_names(idents: list[int]) -> list[str]:
        alive = {thread.ident: thread.name for thread in threading.enumerate()}
        return ["training", *(alive.get(ident, f"thread {ident}") for ident in idents[1:])]


_nothing: Any = "".format
"""Does nothing, whatever it is given, and is false; in C, since a frame of Python takes longer than the rest."""


class Span:
    """A span, as a context manager. It begins when it is made."""

    __slots__ = ("_begin", "_gpu", "_log", "_parent", "_step", "name", "outer")
    __enter__ = staticmethod(_nothing)

    def __init__(self, log: SpanLog, name: str) -> None:
        self._log = log
        self.name = name
        step = log.step
        self._step = log.step_now() if step is None else step
        self._gpu = _CudaTimes() if log.cuda else None
        self._parent = 0 if _get_running_loop() is None else inside.get() or NO_PARENT
        self._begin = begin = perf_counter_ns()
        if self._parent:
            inside.set(begin)
        elif get_ident() == log.training_thread:
            self.outer = log.open
            log.open = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = perf_counter_ns()
        parent = self._parent
        if parent:
            inside.set(max(0, parent))  # not reset(): a coroutine may be closed in another context
        gpu = self._gpu
        if gpu is not None:
            gpu.stop()
        log = self._log
        records = log.records
        if len(records) >= CAPACITY:
            log.make_room()
        records.append((self.name, self._step, self._begin, end, get_ident(), parent, gpu))
        if log.open is self:
            log.open = self.outer
        else:
            log.unlink(self)
        if not log.announced:
            log.announce()

    def _forget(self) -> None:
        """End without a record."""
        if self._parent:
            inside.set(max(0, self._parent))
        if self._log.open is self:
            self._log.open = self.outer
        else:
            self._log.unlink(self)


class NoSpan:
    """Measures nothing."""

    __slots__ = ()
    __enter__ = __exit__ = staticmethod(_nothing)


NO_SPAN = NoSpan()


def span(name: str) -> Span | NoSpan:
    """A span of the connected observer; where none is connected, nothing is measured."""
    log = active
    return NO_SPAN if log is None else Span(log, name)


class _CudaTimes:
    """Two CUDA events on the current stream, around what a span queues there. Nothing ever waits for them."""

    def __init__(self) -> None:
        self._start: Any = self._recorded()
        self._end: Any = None

    @staticmethod
    def _recorded() -> Any:
        torch = sys.modules.get("torch")
        try:
            if torch is None or not torch.cuda.is_initialized():
                return None  # nothing is on a GPU, and this must not be what makes a context there
            if torch.cuda.is_current_stream_capturing():
                return None  # it would become part of the user's CUDA graph
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        except Exception:  # the device has failed; the training's own error is the one to show
            return None
        return event

    def stop(self) -> None:
        """The span ends."""
        self._end = self._recorded() if self._start is not None else None

    def ready(self) -> bool:
        """Whether the GPU has come past the end, or there is nothing to wait for."""
        try:
            return self._end is None or bool(self._end.query())
        except Exception:  # the device has failed
            self._end = None
            return True

    def elapsed_ns(self) -> int:
        """Time on the GPU; -1 where there was none."""
        try:
            return -1 if self._end is None else round(self._start.elapsed_time(self._end) * 1e6)
        except Exception:  # the device has failed, or they are on two
            return -1


def _text(name: object) -> str:
    """The text of a name that is none."""
    try:
        return str(name)
    except Exception:
        return type(name).__name__


def _unix_zero() -> int:
    """The Unix time, in nanoseconds, at which ``perf_counter_ns`` was 0; the best of a few looks at both clocks."""
    looks = [(perf_counter_ns(), time_ns(), perf_counter_ns()) for _ in range(5)]
    before, now, after = min(looks, key=lambda look: look[2] - look[0])
    return now - (before + after) // 2


def _ignore(event: object) -> None: ...
