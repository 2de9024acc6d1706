"""Where the time of a run's steps went, by phase and rank, and whom the ranks waited for; from the run's journal."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.text import Text

from swanlab_ray.actors.health.stragglers import ELSEWHERE, NAMED, Lateness, Straggler, worst
from swanlab_ray.actors.journal.batches import BatchReader
from swanlab_ray.actors.journal.records import Arrived, Batch, Ended
from swanlab_ray.actors.reduction.spans import RankSpans, StepTimes
from swanlab_ray.actors.runs.finding import RunFiles
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.actors.wire.events import Spans
from swanlab_ray.observer.looking.render import Column, Grid, cell


@dataclass(frozen=True, slots=True)
class StepBreakdown:
    """One step of all ranks."""

    step: int
    ranks: dict[int, StepTimes]
    straggler: Straggler | None
    """Whom the others waited for; None where not all ranks have reported the step."""

    def as_json(self) -> dict[str, Any]:
        """Plain values, seconds."""
        return {
            "step": self.step,
            "straggler": self.straggler.rank if self.straggler else None,
            "phase": self.straggler.phase if self.straggler else None,
            "score": self.straggler.score if self.straggler else None,
            "ranks": {rank: seconds_of(times) for rank, times in sorted(self.ranks.items())},
        }


def seconds_of(times: StepTimes) -> dict[str, float]:
    """Seconds of a step by phase, in order; what was outside of all spans comes last."""
    seconds = {name: phase.own for name, phase in times.phases.items()}
    return seconds | {ELSEWHERE: sum(phase.before for phase in times.phases.values())}


FEW_RANKS = 6
STEPS = 1_000
"""Steps that are looked at unless something else is asked for: a long run does not fit into memory."""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """The steps of a run."""

    steps: list[StepBreakdown]
    straggler: Straggler | None
    """Whom the ranks waited for in them."""
    dropped: int
    """Spans that ranks had to drop, in the whole run."""


def breakdown(run: RunFiles, last: int = STEPS) -> Breakdown:
    """Where the time went.

    Args:
        run: its files.
        last: only so many steps, the latest ones.
    """
    steps: dict[int, dict[int, StepTimes]] = {}
    ranks: dict[int, RankSpans] = {}
    batches = BatchReader()
    dropped = 0

    def take(rank: int, over: list[StepTimes]) -> None:
        for times in over:
            if not times.phases:
                continue
            steps.setdefault(times.step, {})[rank] = times  # a later life's replaces that of an earlier one
            if len(steps) > last:
                del steps[min(steps)]

    for entry in merged(run):
        if isinstance(entry, (Arrived, Ended)):
            take(entry.rank, ranks.pop(entry.rank, RankSpans()).close())
        elif isinstance(entry, Batch):
            for event in batches.events(entry):
                if isinstance(event, Spans):
                    dropped += event.dropped
                    take(entry.rank, ranks.setdefault(entry.rank, RankSpans()).take(event))
    for rank, spans in ranks.items():
        take(rank, spans.close())
    size = max(map(len, steps.values()), default=0)
    lateness = Lateness()
    found: list[StepBreakdown] = []
    window = deque[tuple[Any, float]]()
    for step, of_ranks in sorted(steps.items()):
        straggler = None
        if len(of_ranks) == size > 1:
            one = lateness.waits(of_ranks), median(times.seconds for times in of_ranks.values())
            window.append(one)
            straggler = worst([one])
        found.append(StepBreakdown(step, of_ranks, straggler))
    total = worst(window)
    return Breakdown(found, total if total is not None and total.score >= NAMED else None, dropped)


def phases_table(steps: list[StepBreakdown]) -> Grid:
    """Mean time of a step by phase and rank, the longest of a phase in bold. Ranks are columns while they are few."""
    sums: dict[int, dict[str, float]] = {}
    counts: dict[int, int] = {}
    for one in steps:
        for rank, times in one.ranks.items():
            counts[rank] = counts.get(rank, 0) + 1
            of_rank = sums.setdefault(rank, {})
            for phase, seconds in seconds_of(times).items():
                of_rank[phase] = of_rank.get(phase, 0.0) + seconds
    names = dict.fromkeys(name for of_rank in sums.values() for name in of_rank if name != ELSEWHERE)
    phases = [*names, ELSEWHERE, "step"]
    means_of: dict[tuple[int, str], Text] = {}
    for rank in sums:
        sums[rank]["step"] = sum(sums[rank].values())
    for name in phases:
        means = {rank: of_rank[name] / counts[rank] for rank, of_rank in sums.items() if name in of_rank}
        for rank, seconds in means.items():
            stands_out = len(sums) > 1 and name != "step" and seconds == max(means.values()) > 0
            means_of[rank, name] = cell(_seconds(seconds), "bold" if stands_out else "")
    if len(sums) <= FEW_RANKS:
        grid = Grid(Column("phase", least=16), *(Column(f"rank {rank}", right=True) for rank in sorted(sums)))
        for name in phases:
            grid.add(name, *(means_of.get((rank, name), "") for rank in sorted(sums)))
        return grid
    grid = Grid(Column("rank", right=True), *(Column(name, right=True, least=len("99.9 ms")) for name in phases))
    for rank in sorted(sums):
        grid.add(str(rank), *(means_of.get((rank, name), "") for name in phases))
    return grid


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
