"""From spans to series: where the time goes over ranks, and whom they wait for.

A span's name becomes ``profiling/<name>`` in seconds: of one rank as it is, of several as their mean, and beside it
``ranks/profiling/<name>/{max,p95,argmax}``. That is a handful of series at any world size; the journal has every span.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

from swanlab_ray.actors.health.stragglers import NAMED, Straggler, Stragglers
from swanlab_ray.actors.reduction.aggregate import Aggregator, Emit
from swanlab_ray.actors.reduction.spans import PREFIX, RankSpans, StepTimes, outside
from swanlab_ray.actors.wire.events import USER, Scalars, Spans

NAMES = 200
"""Names of spans that get series; those of further ones are in the journal only."""
BURST = 200
"""Steps of a name that are written at once; later ones follow at one a second."""
STRAGGLER = "ranks/straggler"
"""Rank that the others waited for; -1 where that was less than a tenth of the step."""
SCORE = "ranks/straggler_score"
"""Share of the step that the typical rank waited for it."""
DECIDED_STEPS = 1_000
"""Steps by which a rank may be behind the first one."""
_OVER_RANKS = f"ranks/{PREFIX}"


class Timings:
    """Reduces the spans of all ranks.

    Args:
        emit: receives what is to be written.
        notice: takes a sentence for the user.
        emit_again: receives what replaces earlier rows; by default as any other.
    """

    def __init__(self, emit: Emit, notice: Callable[[str], None], emit_again: Emit | None = None) -> None:
        self._emit = emit
        self._notice = notice
        self._ranks: dict[int, RankSpans] = {}
        self._emit_again = emit_again or emit
        self._aggregator = Aggregator(self._write, 0, self._write_again)
        self._stragglers = Stragglers()
        self._straggler_pace = _Pace()
        self._told_straggler = -1  # the highest step
        self._paces: dict[str, _Pace] = {}
        self._too_many = False
        self.dropped = 0
        """Spans that ranks could not keep."""

    @property
    def straggler(self) -> Straggler | None:
        """Whom the ranks wait for at present."""
        return self._stragglers.current

    @property
    def waiting(self) -> bool:
        """Whether steps wait for ranks that are silent about them."""
        return self._aggregator.waiting

    def take(self, rank: int, event: Spans, now: float, standing: Callable[[Scalars], Scalars | None]) -> None:
        """Take the spans of a rank. ``standing`` leaves what no resumed training has replaced; ``now`` in seconds."""
        self.dropped += event.dropped + outside(event)
        for times in self._ranks.setdefault(rank, RankSpans()).take(event):
            self._add(rank, times, now, standing)

    def end_rank(self, rank: int, now: float, standing: Callable[[Scalars], Scalars | None]) -> None:
        """No more spans of this rank come."""
        spans = self._ranks.pop(rank, None)
        for times in spans.close() if spans is not None else []:
            self._add(rank, times, now, standing)

    def restart_rank(self, rank: int) -> None:
        """A new life of this rank begins."""
        self._ranks.pop(rank, None)
        self._aggregator.restart_rank(rank)
        self._stragglers.restart_rank(rank)

    def set_ranks(self, running: set[int], missing: int) -> None:
        """Say which ranks are running, and how many have not said hello yet."""
        self._aggregator.set_ranks(running, missing)
        self._stragglers.set_ranks(running, missing)

    def rewind(self, rank: int, step: int) -> None:
        """From this step on a rank runs its steps again."""
        self._aggregator.rewind(rank, step)
        for pace in self._paces.values():
            pace.rewind(step)

    def passed(self, rank: int, step: int) -> None:
        """A rank is at this step. Its spans may come later than it says so."""
        if rank not in self._ranks:
            self._aggregator.passed(rank, step)

    @property
    def late(self) -> int:
        """Values that came after their step was written."""
        return self._aggregator.late

    @property
    def repeated(self) -> int:
        """Values of a rank at a step that it had logged before."""
        return self._aggregator.repeated

    def tick(self, now: float) -> None:
        """Write what has waited too long."""
        self._aggregator.tick(now)

    def flush(self) -> None:
        """Write everything: the run ends."""
        self._aggregator.flush()

    def _add(self, rank: int, times: StepTimes, now: float, standing: Callable[[Scalars], Scalars | None]) -> None:
        named = {
            PREFIX + name: seconds
            for name, seconds in times.by_name.items()
            if (pace := self._pace(name)) is not None and pace.due(times.step, now)
        }
        kept = standing(Scalars(times.step, times.time_ns, USER, named)) if named else None
        if kept is not None:
            self._aggregator.add(rank, kept, now)
        elif named:
            return  # a resumed training has replaced it
        else:
            self._aggregator.passed(rank, times.step)
        straggler = self._stragglers.add(rank, times) if times.phases else None
        if straggler is not None and self._straggler_pace.due(times.step, now):
            named_rank = straggler.rank if straggler.score >= NAMED else -1
            emit = self._emit if times.step > self._told_straggler else self._emit_again
            self._told_straggler = max(self._told_straggler, times.step)
            emit(times.step, times.time_ns, {STRAGGLER: float(named_rank), SCORE: straggler.score})

    def _pace(self, name: str) -> _Pace | None:
        pace = self._paces.get(name)
        if pace is None and len(self._paces) < NAMES:
            pace = self._paces[name] = _Pace()
        elif pace is None and not self._too_many:
            self._too_many = True
            self._notice(f"There are more than {NAMES} names of spans; of the others SwanLab gets no series.")
        return pace

    def _write(self, step: int, time_ns: int, values: dict[str, float]) -> None:
        """Names at a step: their values, and the view over ranks."""
        self._emit(step, time_ns, _shown(values))

    def _write_again(self, step: int, time_ns: int, values: dict[str, float]) -> None:
        self._emit_again(step, time_ns, _shown(values))


def _shown(values: dict[str, float]) -> dict[str, float]:
    left_out = {key for key in values if key.startswith(_OVER_RANKS) and key.endswith(("/mean", "/min"))}
    return {key: value for key, value in values.items() if key not in left_out}


class _Pace:
    """At which steps a name is written: the same for all ranks, by the time at which the first of them reports it."""

    def __init__(self) -> None:
        self._room: float = BURST
        self._then = 0.0
        self._decided: dict[int, bool] = {}
        self._steps: list[int] = []  # a heap of them
        self._floor = 0  # below this step decisions are forgotten

    def due(self, step: int, now: float) -> bool:
        """Whether the name is written at this step; ``now`` in seconds."""
        due = self._decided.get(step)
        if due is None:
            if step < self._floor:
                return False  # if the others have written it, then without this rank
            self._room = min(BURST, self._room + max(0.0, now - self._then))
            self._then = max(self._then, now)
            due = self._decided[step] = self._room >= 1
            self._room -= due
            heappush(self._steps, step)
            if len(self._steps) > DECIDED_STEPS:
                lowest = heappop(self._steps)
                del self._decided[lowest]
                self._floor = max(self._floor, lowest + 1)
        return due

    def rewind(self, step: int) -> None:
        """Steps from this one on are run again."""
        self._floor = min(self._floor, step)
