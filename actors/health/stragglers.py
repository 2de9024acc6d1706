"""Which rank the others wait for, and in which phase it loses the time.

Ranks that train together meet in collectives, so in the end all of them take equally long: those that are early wait.
Whoever is slow shows *before* they meet. So the phases of a step are gone through in order, and of each rank is kept
how far it is behind the first one. Where a phase brings them together again (the spread halves at least), they have met
in it: the one that was furthest behind was waited for, and the phases in which it had fallen behind are the cause.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median, median_low

from swanlab_ray.actors.reduction.spans import Phase, StepTimes

WINDOW = 20
"""Steps over which a straggler is named."""
NAMED = 0.1
"""Share of the time that ranks must wait for one of them before it is named."""
MET = 0.5
"""Ranks have met in a phase when it leaves this much of the spread between them, at the most."""
NOISE = 0.01
"""Spread between ranks, as a share of the step, that says nothing."""
APART = 5
"""Steps without a meeting after which the ranks are taken not to wait for each other."""
ELSEWHERE = "other"
"""The time of the training thread outside of all spans."""


@dataclass(frozen=True, slots=True)
class Straggler:
    """A rank that others wait for."""

    rank: int
    phase: str
    score: float
    """Share of the step's time that the typical rank waits for it: 0 to 1."""

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.phase} ({self.score:.0%} of the time is waiting for it)"


class Lateness:
    """How far each rank is behind the first one, and why; from step to step."""

    def __init__(self) -> None:
        self._behind: dict[int, float] = {}
        self._lost: dict[int, Counter[str]] = {}
        self._apart = 0  # steps in which they have not met

    def waits(self, ranks: Mapping[int, StepTimes]) -> Counter[tuple[int, str]]:
        """Seconds of the next step that the typical rank waited: by the rank it waited for, and the phase that rank had
        lost them in.

        Args:
            ranks: the step's times, of every rank.
        """
        if self._behind.keys() != ranks.keys():
            self._begin(ranks)
        waited: Counter[tuple[int, str]] = Counter()
        noise = NOISE * median(times.seconds for times in ranks.values())
        met = False
        for phase in _order(ranks.values()):
            for name, part in ((ELSEWHERE, "before"), (phase, "own")):
                taken = {rank: getattr(times.phases.get(phase, _NO_TIME), part) for rank, times in ranks.items()}
                after = {rank: self._behind[rank] + seconds for rank, seconds in taken.items()}
                spread = _spread(self._behind)
                if spread > noise and _spread(after) <= MET * spread:
                    met = True
                    waited.update(self._blame())
                    self._begin(ranks)  # now they are together
                    continue
                for rank, seconds in taken.items():
                    self._lost[rank][name] += seconds
                first = min(after.values())
                self._behind = {rank: late - first for rank, late in after.items()}
        self._apart = 0 if met else self._apart + 1
        if self._apart == APART:  # they do not wait for each other: the slowest one is simply that
            waited.update(self._blame())
            self._begin(ranks)
        return waited

    def _begin(self, ranks: Iterable[int]) -> None:
        self._apart = 0
        self._behind = dict.fromkeys(ranks, 0.0)
        self._lost = {rank: Counter() for rank in self._behind}

    def _blame(self) -> dict[tuple[int, str], float]:
        last = max(self._behind, key=lambda rank: self._behind[rank])
        seconds = self._behind[last] - median_low(self._behind.values())
        # Where it took longer than the typical rank.
        excess = {
            phase: taken - median_low(lost[phase] for lost in self._lost.values())
            for phase, taken in self._lost[last].items()
        }
        return {(last, max(excess, key=lambda phase: excess[phase])): seconds} if seconds > 0 and excess else {}


_NO_TIME = Phase()


def _spread(values: Mapping[int, float]) -> float:
    return max(values.values()) - min(values.values())


def _order(ranks: Iterable[StepTimes]) -> list[str]:
    """The phases of all ranks, in the order in which they began on the rank that has most of them."""
    phases = sorted((list(times.phases) for times in ranks), key=len, reverse=True)
    return list(dict.fromkeys(name for names in phases for name in names))


class Stragglers:
    """Looks at every step once all ranks have reported it."""

    def __init__(self) -> None:
        self._running: set[int] = set()
        self._missing = 1
        self._steps: dict[int, dict[int, StepTimes]] = {}
        self._lateness = Lateness()
        self.current: Straggler | None = None
        """Whom the ranks have waited for in the last steps, if it was worth naming."""
        self._window: deque[tuple[Counter[tuple[int, str]], float]] = deque(maxlen=WINDOW)

    def set_ranks(self, running: set[int], missing: int) -> None:
        """Say which ranks are running, and how many have not said hello yet."""
        self._running, self._missing = set(running), missing

    def restart_rank(self, rank: int) -> None:
        """A new life of this rank begins: what was known of the ranks does not hold any more."""
        for ranks in self._steps.values():
            ranks.pop(rank, None)
        self._lateness = Lateness()
        self._window.clear()
        self.current = None

    def add(self, rank: int, times: StepTimes) -> Straggler | None:
        """Take a step of one rank; when it was the last one of that step, returns who was waited for in it."""
        ranks = self._steps.setdefault(times.step, {})
        ranks[rank] = times
        if len(self._steps) > 10 * WINDOW:
            del self._steps[next(iter(self._steps))]  # the lowest, mostly; not that of a rank that is far behind
        if self._missing or len(ranks) < 2 or not self._running <= ranks.keys():
            return None
        del self._steps[times.step]
        waited, seconds = self._lateness.waits(ranks), median(one.seconds for one in ranks.values())
        self._window.append((waited, seconds))
        lately = worst(self._window)
        self.current = lately if lately is not None and lately.score >= NAMED else None
        return worst([(waited, seconds)])


def worst(steps: Iterable[tuple[Counter[tuple[int, str]], float]]) -> Straggler | None:
    """The rank that was waited for most in these steps, each given as its waits and its seconds; rank -1: none."""
    steps = list(steps)
    total = sum(seconds for _, seconds in steps)
    waited: Counter[tuple[int, str]] = Counter()
    for one, _ in steps:
        waited.update(one)
    if total <= 0:
        return None
    by_rank: Counter[int] = Counter()
    for (rank, _), seconds in waited.items():
        by_rank[rank] += seconds
    if not by_rank:
        return Straggler(-1, "", 0.0)
    rank, seconds = by_rank.most_common(1)[0]
    phase = max((phase for other, phase in waited if other == rank), key=lambda phase: waited[rank, phase])
    return Straggler(rank, phase, min(1.0, seconds / total))
