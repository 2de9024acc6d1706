"""Carries what is committed through the reduction into SwanLab, on a thread of its own.

It may fall behind: SwanLab is slow, its cloud is away, or this writer has just taken over a run. Beyond a bound nothing
waits in memory then; it reads on in the journal from where it stands.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from swanlab_ray.actors.completions.buffers import CompletionBuffer
from swanlab_ray.actors.completions.tables import Table
from swanlab_ray.actors.delivery.disk import SwanLabRun
from swanlab_ray.actors.delivery.sink import Sink
from swanlab_ray.actors.journal.decoding import Decoded
from swanlab_ray.actors.journal.files import journal_files
from swanlab_ray.actors.journal.reading import Damaged, Follower
from swanlab_ray.actors.journal.records import Batch, Entry, Finished, UnknownFormat
from swanlab_ray.actors.journal.writing import Position
from swanlab_ray.actors.log import log
from swanlab_ray.actors.notify.rules import Fired, Rules
from swanlab_ray.actors.reduction.reduction import Reduction
from swanlab_ray.actors.reduction.supersession import supersession
from swanlab_ray.actors.reduction.timings import Timings
from swanlab_ray.actors.runs.finding import RunFiles, find_runs
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.codec import unpacked_size
from swanlab_ray.actors.wire.events import Event
from swanlab_ray.actors.wire.text import brief

AHEAD_BYTES = 64 << 20
"""Bytes of batches, unpacked, that may wait in memory with their events."""
FIRED = 1000
"""Alerts that may wait to be told; the oldest go first."""
REWRITE_SCALARS = {"offline": 1_000_000, "local": 20_000}
"""A larger run on disk is not written a second time at its end: SwanLab would not be done in time."""


class _Item(NamedTuple):
    decoded: Decoded
    queued: float
    size: int
    """Bytes of its batch, unpacked."""


class Reducer:
    """Follows a run's journal into a sink, once that is opened.

    Args:
        directory: the run's.
        begun: where the journal begins, as far as it can be read.
        committed: how far it goes now; all of that is read first.
        make_sink: makes the sink; called again where SwanLab's run has to be written anew.
        settings: of the run.
        notice: takes a sentence for the user.
        since_ns: when the run's job before this one had ended; what lies before raises no alert any more.
    """

    def __init__(
        self,
        directory: Path,
        begun: Position,
        committed: Position,
        make_sink: Callable[[], Sink],
        settings: ObserverSettings,
        notice: Callable[[str], None],
        since_ns: int = 0,
    ) -> None:
        self._follower = Follower(directory, begun)
        self._committed = committed
        self._behind = True  # until it was opened, and what is there was read
        self._behind_since = time.monotonic()
        self._make_sink = make_sink
        self._settings = settings
        self._notice = notice
        self.sink = make_sink()
        self.opened = False
        self._rules = Rules(settings.alerts, since_ns)
        self._reduction = Reduction(
            self, settings, notice=notice, emit_again=self._write_replacing, on_nonfinite=self._look_at_nonfinite
        )
        self._fired: deque[Fired] = deque(maxlen=FIRED)
        self._passed_on = 0  # scalars
        self._queue: deque[_Item] = deque()
        self._bytes = 0  # of what is queued
        self._changed = threading.Condition()
        self._ended = False
        self._excused = False
        self._finished: Finished | None = None
        """The end that the writer is waiting for; others that the journal tells of are those of earlier sessions."""

    def open(self, finished: Finished | None = None) -> None:
        """Open SwanLab's run and begin, where that was not done.

        Args:
            finished: the end of the run, where the journal has it already and SwanLab has not.
        """
        with self._changed:
            if self.opened or self._ended:
                return
            self._behind_since = time.monotonic()
            if finished is not None:
                self.finish(finished)
            self.sink.start()
            threading.Thread(target=self._work, name="reducer", daemon=True).start()
            self.opened = True  # unless this process can have no more threads: then it is tried again

    @property
    def late(self) -> int:
        """Values that came after their step was written."""
        return self._reduction.late

    @property
    def repeated(self) -> int:
        """Values of a rank for a name at a step that it had logged before."""
        return self._reduction.repeated

    @property
    def refused(self) -> int:
        """Events that could not be worked off."""
        return self._reduction.refused

    @property
    def completions(self) -> CompletionBuffer:
        """The rows of completions."""
        return self._reduction.completions

    @property
    def completions_dropped(self) -> int:
        """Those of them that got into no table, or not into SwanLab."""
        return self.completions.dropped + self.sink.completions_lost

    @property
    def timings(self) -> Timings:
        """Where the time goes."""
        return self._reduction.timings

    @property
    def waiting(self) -> bool:
        """Whether values wait for ranks that are silent about them."""
        return self._reduction.waiting

    def lag(self) -> float:
        """Seconds by which SwanLab is behind what was acknowledged."""
        if not self.opened:
            return 0.0
        with self._changed:
            since = self._behind_since if self._behind else self._queue[0].queued if self._queue else None
        return max(self.sink.lag(), time.monotonic() - since if since is not None else 0.0)

    def put(self, decoded: Decoded) -> None:
        """Take the next entry of the journal. Never blocks."""
        entry = decoded.entry
        with self._changed:
            self._committed = decoded.position
            if not self._behind and self._bytes > AHEAD_BYTES:
                self._behind, self._behind_since = True, time.monotonic()
            if not self._behind:
                size = unpacked_size(entry.data) if isinstance(entry, Batch) else 0
                self._queue.append(_Item(decoded, time.monotonic(), size))
                self._bytes += size
            self._changed.notify()

    def finish(self, finished: Finished) -> None:
        """The run ends with this entry, which will be in the journal."""
        self._finished = finished
        self.sink.hurry()

    @property
    def closed(self) -> bool:
        """Whether SwanLab's run is closed, or given up."""
        return self._ended and self.sink.closed.is_set()

    def abandon(self, close: bool) -> None:
        """Take nothing more. ``close``: SwanLab's run ends here; otherwise another writer goes on with it."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self.sink.complete = False
        if close and self._finished is not None:
            self.sink.finish(self._finished.state, self._finished.error)
        else:
            self.sink.stop()

    def _work(self) -> None:
        while not self._ended:
            with self._changed:
                while not (self._queue or self._behind or self._ended):
                    self._changed.wait()
                item = self._queue.popleft() if self._queue else None
                if item is not None:
                    self._bytes -= item.size
            try:
                if item is not None:
                    self._take(item.decoded.entry, item.decoded.events)
                    self._follower.position = item.decoded.position
                elif self._behind:
                    self._catch_up()
            except Exception:
                self._excuse()

    def _catch_up(self) -> None:
        with self._changed:
            until = self._committed
        patient, self.sink.waits = self.sink.waits, True  # history is not thinned
        try:
            for found in self._follower.read(until):
                if isinstance(found, Damaged):
                    if found.damage.torn:
                        continue
                    self.sink.complete = False
                    self._notice(
                        f"The journal is damaged ({found.path.name}: {found.damage.reason}): swanlab-ray verify."
                    )
                    continue
                try:
                    self._take(found, None)
                except Exception:
                    self._excuse()
                if self._ended:
                    return
        except Exception as error:  # of reading; tried again it would be the same
            if not isinstance(error, (OSError, UnknownFormat)):
                log(traceback.format_exc())
            self.sink.complete = False
            self._notice(f"The journal cannot be read ({brief(error)}); SwanLab misses a part of this run.")
            self._follower.position = until
            if self._finished is not None:  # which may be in that part
                self._reduction.flush()
                self._end(self._finished)
                return
        finally:
            self.sink.waits = patient
        with self._changed:
            if self._committed == until and not self._queue:
                self._behind = False

    def _take(self, entry: Entry, events: list[Event] | None) -> None:
        self._reduction.take(entry, events)
        finished = self._finished
        if isinstance(entry, Finished) and finished is not None and entry.time_ns == finished.time_ns:
            self._end(finished)

    def _end(self, finished: Finished) -> None:
        """Close SwanLab's run, whatever happens."""
        try:
            if self._reduction.rewound and isinstance(self.sink, SwanLabRun):
                self._write_again(self.sink)
        except Exception as error:
            log(traceback.format_exc())
            self.sink.complete = False
            self._notice(
                f"Steps were run again, and SwanLab's run could not be written anew ({brief(error)}). "
                f"{self._in_the_journal}"
            )
        finally:
            self._ended = True
            self.sink.complete = self.sink.complete and not self._reduction.unread
            self.sink.finish(finished.state, finished.error)

    def _write_again(self, sink: SwanLabRun) -> None:
        """Steps were run again by a training that was resumed, and a SwanLab run on disk keeps the first value."""
        if self._passed_on > REWRITE_SCALARS[sink.mode]:
            sink.complete = False
            self._notice(f"Steps were run again; this SwanLab run shows their first values. {self._in_the_journal}")
            return
        run = self._files()
        superseded = supersession(run)
        sink.restart()
        self.sink = again = self._make_sink()
        again.waits = True
        again.start()
        again.hurry(sink.left())
        reduction = Reduction(again, self._settings, superseded)
        for found in merged(run):
            if not isinstance(found, Damaged):
                reduction.take(found)
        reduction.flush()

    def _files(self) -> RunFiles:
        """The files of this run; there may be stray ones of others beside them."""
        directory = self._follower.directory
        own = journal_files(directory)[self._follower.position.epoch].resolve()
        return next(run for run in find_runs([directory]) if own in run.journals)

    @property
    def _in_the_journal(self) -> str:
        return f"The later ones are in the journal: swanlab-ray sync {self._follower.directory}"

    def write(self, step: int, time_ns: int, values: dict[str, float], table: Table | None = None) -> None:
        """Pass on a row of the reduction."""
        self._passed_on += len(values)
        self.sink.write(step, time_ns, values, table)
        self._fired += self._rules.look(step, time_ns, values)

    def _write_replacing(self, step: int, time_ns: int, values: dict[str, float]) -> None:
        """Pass on a row that replaces another: a SwanLab run on disk would keep the first one, and is written again."""
        if not isinstance(self.sink, SwanLabRun):
            self.sink.write(step, time_ns, values)
        self._fired += self._rules.look(step, time_ns, values)

    def _look_at_nonfinite(self, rank: int, name: str, step: int, time_ns: int, value: float) -> None:
        self._fired += self._rules.nonfinite(rank, name, step, time_ns, value)

    def fired(self) -> list[Fired]:
        """Rules that have come true since this was asked last."""
        return [self._fired.popleft() for _ in range(len(self._fired))]

    def config(self, values: dict[str, Any]) -> None:
        """Pass on an update of the configuration."""
        self.sink.config(values)

    def _excuse(self) -> None:
        """Say that something could not be worked off; one bad value must not end the run."""
        log(traceback.format_exc())
        if not self._excused:
            self._excused = True
            self._notice("Some values could not be written; see the writer's log.")
