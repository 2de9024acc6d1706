"""Spans as the writer reads them, and what they add up to: the time of each step by name, and by phase.

A *phase* is what the training thread was at: the innermost span, or the time before a span in which there was none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from swanlab_ray.actors.wire.events import Spans

PREFIX = "profiling/"
"""Of the series that SwanLab gets."""
MEAN = "Time taken: "
"""Names of single calls begin like this: of several in a step the mean counts. Of phases it is the sum."""
OUTERMOST = 4_096
"""Outermost spans of a step that are kept apart, to tell what lies inside of one that ends later; more are merged."""
STEPS = 1 << 63
"""Steps are below this."""
NAMES_PER_STEP = 1_000
"""Names of spans that are added up in a step."""


class Span(NamedTuple):
    """A span that has ended. Times are Unix nanoseconds by the clock of the rank's host."""

    thread: str
    name: str
    step: int
    begin: int
    duration: int
    parent: int
    """In an asyncio task the begin of the span around it, -1 where there is none; 0: it nests by its times."""
    gpu: int
    """Nanoseconds on the GPU; -1 where that was not measured."""
    training: bool
    """On the thread that trains."""

    @property
    def end(self) -> int:
        """When it ended."""
        return self.begin + self.duration


def outside(event: Spans) -> int:
    """How many of its spans belong to no step that can be."""
    if not event.step or (min(event.step) >= 0 and max(event.step) < STEPS):
        return 0
    return sum(not 0 <= step < STEPS for step in event.step)


def spans_of(event: Spans) -> Iterator[Span]:
    """The spans of an event, in the order of their ends, but for those :func:`outside`."""
    names, threads = event.names, event.threads
    columns = (event.thread, event.name, event.step, event.begins, event.durations)
    for at, (thread, name, step, begin, duration) in enumerate(zip(*columns, strict=True)):
        if not 0 <= step < STEPS:
            continue
        begin, duration = begin + event.begin_ns, max(0, duration)  # of a clock that was set back
        parent = event.parents[at] if event.parents else 0
        around = begin - parent if parent > 0 else parent
        gpu = event.gpu[at] if event.gpu else -1
        yield Span(threads[thread], names[name], step, begin, duration, around, gpu, thread == 0)


@dataclass(slots=True)
class Phase:
    """Time of one rank in one step, in seconds."""

    own: float = 0.0
    """In spans of this name, without what lies in spans inside of them."""
    before: float = 0.0
    """Between the span before and these."""


@dataclass(slots=True)
class StepTimes:
    """Where the time of one rank went in one step."""

    step: int
    time_ns: int
    """When its last span ended."""
    by_name: dict[str, float]
    """Seconds: of phases the sum, of calls (``Time taken: ...``) the mean."""
    phases: dict[str, Phase]
    """Of the training thread, in the order in which they began."""

    @property
    def seconds(self) -> float:
        """All of its time."""
        return sum(phase.own + phase.before for phase in self.phases.values())


@dataclass(slots=True)
class _Outermost:
    name: str
    begin: int
    end: int
    covered: int
    """Nanoseconds in spans: less than from begin to end where several are merged."""


@dataclass(slots=True)
class _Open:
    """A step whose spans are still coming."""

    step: int
    time_ns: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)  # seconds, calls
    own: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    outermost: list[_Outermost] = field(default_factory=list)


class RankSpans:
    """Adds up the spans of one rank. A step is over when a span of a later one comes."""

    def __init__(self) -> None:
        self._open: _Open | None = None
        self._until = 0  # end of the training thread's last outermost span of the steps before
        self._latest = 0  # end of its latest span

    def take(self, event: Spans) -> list[StepTimes]:
        """Take an event; returns the steps that are over."""
        over: list[StepTimes] = []
        for span in spans_of(event):
            opened = self._open
            if opened is not None and span.step < opened.step and not (span.training and span.begin >= self._latest):
                # It began in a step that is over, and ends only now.
                over.append(StepTimes(span.step, span.end, {span.name: span.duration * 1e-9}, {}))
                continue
            if opened is None or span.step != opened.step:  # also to an earlier one, where steps are run again
                over += self.close()
                opened = self._open = _Open(span.step)
            self._add(opened, span)
        return over

    def close(self) -> list[StepTimes]:
        """The step that is open, if there is one: no more spans of it come."""
        opened, self._open = self._open, None
        if opened is None:
            return []
        for span in opened.outermost:
            idle = span.end - span.begin - span.covered
            if self._until:
                idle += max(0, span.begin - self._until)
            opened.before[span.name] = opened.before.get(span.name, 0.0) + idle * 1e-9
            self._until = max(self._until, span.end)
        by_name = {
            name: seconds / calls if name.startswith(MEAN) else seconds
            for name, (seconds, calls) in opened.sums.items()
        }
        order = sorted(opened.first, key=lambda name: opened.first[name])
        phases = {name: Phase(opened.own[name], opened.before.get(name, 0.0)) for name in order}
        return [StepTimes(opened.step, opened.time_ns, by_name, phases)]

    def _add(self, opened: _Open, span: Span) -> None:
        opened.time_ns = max(opened.time_ns, span.end)
        if span.name not in opened.sums and len(opened.sums) >= NAMES_PER_STEP:
            return
        sums = opened.sums.setdefault(span.name, [0.0, 0])
        sums[0] += span.duration * 1e-9
        sums[1] += 1
        if not span.training:
            return
        self._latest = max(self._latest, span.end)
        # The training thread's spans nest, and end after those inside of them. Spans of tasks may overlap.
        outermost, begin, own = opened.outermost, span.begin, span.duration
        while outermost and outermost[-1].begin >= begin:
            own -= outermost.pop().covered
        if outermost:
            own -= max(0, outermost[-1].end - begin)
            begin = max(begin, outermost[-1].end)
        own = max(0, own)
        outermost.append(_Outermost(span.name, begin, span.end, span.end - begin))
        opened.own[span.name] = opened.own.get(span.name, 0.0) + own * 1e-9
        opened.first[span.name] = min(span.begin, opened.first.get(span.name, span.begin))
        if len(outermost) > OUTERMOST:
            first, last = outermost[0], outermost[OUTERMOST // 2]
            covered = sum(one.covered for one in outermost[: OUTERMOST // 2 + 1])
            outermost[: OUTERMOST // 2 + 1] = [_Outermost(first.name, first.begin, last.end, covered)]
