"""A run's spans as one timeline of all ranks, in the JSON that Perfetto and ``chrome://tracing`` open.

A process of the trace is a rank, a thread of it a thread; spans of asyncio tasks that overlap get lines of their own.

Hosts do not agree on the time. Each event of spans carries the time at which its rank sent it, and the journal the time
at which the writer received it: the least difference over all of a host's events is the offset of its clock against the
writer's, and a delay of a few milliseconds that is about the same for every host. What hosts differ by is corrected.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from swanlab_ray.actors.journal.batches import BatchReader
from swanlab_ray.actors.journal.records import Alert, Arrived, Batch
from swanlab_ray.actors.reduction.spans import Span, spans_of
from swanlab_ray.actors.runs.finding import RunFiles
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.actors.wire.events import Spans
from swanlab_ray.observer.looking.render import json_text


class Timeline:
    """The spans of a run, on one clock. They are held in memory, some 300 bytes each.

    Args:
        run: its files.
        steps: only spans of these steps.
    """

    def __init__(self, run: RunFiles, steps: range | None = None) -> None:
        self.count = 0
        """Spans that were found."""
        self._spans: dict[int, list[tuple[str, Span]]] = {}  # by rank, with the host it was on
        self._alerts: dict[Alert, None] = {}
        self._delays: dict[str, int] = {}
        self._all_steps = steps is None
        self._hosts: dict[int, str] = {}
        batches = BatchReader()
        for entry in merged(run):
            if isinstance(entry, Arrived):
                self._hosts[entry.rank] = entry.host
            elif isinstance(entry, Alert):
                self._alerts[entry] = None  # a writer that is started again repeats them
            elif isinstance(entry, Batch):
                for event in batches.events(entry):
                    if isinstance(event, Spans):
                        self._take(entry, event, self._hosts.get(entry.rank, "?"), steps)

    def _take(self, batch: Batch, event: Spans, host: str, steps: range | None) -> None:
        spans = [(host, span) for span in spans_of(event) if steps is None or span.step in steps]
        if spans:
            self.count += len(spans)
            delay = batch.received_ns - event.time_ns
            self._delays[host] = min(delay, self._delays.get(host, delay))
            self._spans.setdefault(batch.rank, []).extend(spans)

    def write(self, path: Path) -> None:
        """Write the trace to a file, compressed where its name ends in ``.gz``.

        Raises:
            OSError: that is not possible.
        """
        with cast(
            "TextIO", gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w", encoding="ascii")
        ) as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [')
            for number, event in enumerate(self.events()):
                file.write((",\n" if number else "\n") + json_text(event))
            file.write("\n]}\n")

    def events(self) -> Iterator[dict[str, Any]]:
        """The events of the trace; times are in microseconds since the first of them."""
        if not self._spans:
            return
        # Times by each host's clock become those of the first host.
        first = self._delays[self._spans[min(self._spans)][0][0]]
        shifts = {host: delay - first for host, delay in self._delays.items()}
        moments = [
            (span.begin + shifts[host], span.end + shifts[host]) for of in self._spans.values() for host, span in of
        ]
        zero, end = min(begin for begin, _ in moments), max(end for _, end in moments)
        if self._all_steps:  # of which some are older than the first span; times before zero are not drawn
            zero = min([zero, *(alert.time_ns - first for alert in self._alerts)])
        for rank, spans in sorted(self._spans.items()):
            moved = [span._replace(begin=span.begin + shifts[host] - zero) for host, span in spans]
            yield from self._of_rank(rank, self._hosts.get(rank, "?"), moved)
        for alert in self._alerts:
            moment = alert.time_ns - first  # by the writer's clock
            if self._all_steps or zero <= moment <= end:
                at, name = (moment - zero) / 1e3, alert.text
                yield {"ph": "i", "s": "g", "name": name, "cat": "alert", "pid": min(self._spans), "tid": 0, "ts": at}

    def _of_rank(self, rank: int, host: str, spans: list[Span]) -> Iterator[dict[str, Any]]:
        yield _meta("process_name", rank, 0, name=f"rank {rank} ({host})")
        yield _meta("process_sort_index", rank, 0, sort_index=rank)
        lanes, last_step = _Lanes(), -1
        for span in sorted(spans, key=lambda span: (span.begin, -span.duration)):
            at = span.begin / 1e3
            lane, around, name = lanes.place(span)
            if name is not None:
                yield _meta("thread_name", rank, lane, name=name)
                yield _meta("thread_sort_index", rank, lane, sort_index=lane)
            if span.training and span.step > last_step:
                last_step = span.step
                yield {"ph": "i", "s": "p", "name": f"step {span.step}", "pid": rank, "tid": lane, "ts": at}
            details: dict[str, Any] = {"step": span.step}
            if around is not None:
                details["parent"] = around.name
            if span.gpu >= 0:
                details["GPU ms"] = span.gpu / 1e6
            complete = {"ph": "X", "name": span.name, "cat": "span", "pid": rank, "tid": lane, "ts": at}
            yield complete | {"dur": span.duration / 1e3, "args": details}


def _meta(kind: str, rank: int, lane: int, **values: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": lane, "args": values}


class _Lanes:
    """The lines of one rank: one for each thread, and more where spans of asyncio tasks overlap."""

    def __init__(self) -> None:
        self._lanes: dict[str, list[tuple[int, list[Span]]]] = {}  # by thread: line, spans open in it
        self._next = 0

    def place(self, span: Span) -> tuple[int, Span | None, str | None]:
        """The line of a span, the span around it, and the line's name if it is new. Spans come by their begin."""
        lanes = self._lanes.setdefault(span.thread, [])
        for lane, opened in lanes:
            while opened and opened[-1].end <= span.begin:
                opened.pop()
            around = opened[-1] if opened else None
            if around is None or (span.end <= around.end and span.parent in (0, around.begin)):
                opened.append(span)
                return lane, around, None
        lane, self._next = self._next, self._next + 1
        lanes.append((lane, [span]))
        return lane, None, span.thread if len(lanes) == 1 else f"{span.thread} ({len(lanes)})"
