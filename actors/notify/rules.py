"""Rules on metrics, such as ``loss < 1.0`` or ``no improvement of eval/loss for 2000 steps``: parsed, and watched.

They see what SwanLab gets, under its names: ``loss`` is the mean over ranks, ``rank/3/loss`` is one rank's. A rule on
NaN also sees what each rank has logged or measured itself: a Trainer leaves NaN out of the loss that it logs.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

REARM_VALUES = 20
"""A comparison that has come true says so again once it was false for so many values: metrics are noisy."""
FIRES = 10
"""How often a rule is told in a run."""

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_METRIC = r"(?P<metric>[^\s<>=!;]+)"
_COMPARED = re.compile(rf"{_METRIC}\s*(?P<sign><=|>=|==|!=|<|>)\s*(?P<bound>\S+)")
_NAN = re.compile(rf"{_METRIC} is nan")
_STALE = re.compile(rf"no (?P<what>improvement|increase|decrease) of {_METRIC} for (?P<steps>[1-9]\d*) steps?")
_LOWER = re.compile(r"loss|perplexity|error|(?<![a-z])[wc]er(?![a-z])", re.I)
_HIGHER = re.compile("acc|reward|f1|bleu|rouge|score|margin", re.I)


class Fired(NamedTuple):
    """A rule has come true."""

    rule: str
    step: int
    value: float
    rank: int | None = None
    """Whose value it is, where that is one rank's."""


@dataclass(slots=True)
class _Comparison:
    """``metric < bound`` and the like."""

    text: str
    metric: str
    compare: Callable[[float, float], bool]
    bound: float
    _armed: bool = True
    _false: int = 0

    def look(self, step: int, values: Mapping[str, float]) -> float | None:
        """The value that makes it come true."""
        value = values.get(self.metric)
        if value is None:
            return None
        if not self.compare(value, self.bound):
            self._false += 1
            self._armed = self._armed or self._false >= REARM_VALUES
            return None
        self._false = 0
        if not self._armed:
            return None
        self._armed = False
        return value


@dataclass(slots=True)
class _Nan:
    """``metric is nan``, on any rank; infinity counts as well."""

    text: str
    metric: str
    _good: int = REARM_VALUES

    def look(self, step: int, values: Mapping[str, float]) -> float | None:
        """The value that makes it come true."""
        metric = self.metric
        measured = (metric, f"ranks/{metric}/mean", f"rank/0/{metric}")  # of a rank's own measurement no plain name
        value = next((values[name] for name in measured if name in values), None)
        if value is None:
            return None
        if math.isfinite(value) and not values.get(f"ranks/{metric}/nonfinite"):
            self._good += 1
            return None
        return (math.nan if math.isfinite(value) else value) if self.fires() else None

    def fires(self) -> bool:
        """It has come true: whether that is to be told."""
        armed, self._good = self._good >= REARM_VALUES, 0
        return armed


@dataclass(slots=True)
class _Stale:
    """``no improvement of metric for n steps``; again when it has improved in between."""

    text: str
    metric: str
    steps: int
    better: Callable[[float, float], bool]
    _best: float = math.nan
    _since: int = 0
    _told: bool = False

    def look(self, step: int, values: Mapping[str, float]) -> float | None:
        """The value that makes it come true."""
        value = values.get(self.metric)
        if value is None:
            return None
        if math.isnan(self._best) or self.better(value, self._best):
            self._best, self._since, self._told = value, step, False
            return None
        if self._told or step - self._since < self.steps:
            return None
        self._told = True
        return value


Rule = _Comparison | _Nan | _Stale


def parse(text: str) -> Rule:
    """The rule that a text means.

    Raises:
        ValueError: it means none; the message says what can be written.
    """
    text = " ".join(text.split())
    if match := _STALE.fullmatch(text):
        what, metric = match["what"], match["metric"]
        lower = bool(_LOWER.search(metric))
        if what == "improvement" and lower == bool(_HIGHER.search(metric)):
            raise ValueError(f"{text!r}: is more of {metric} better? Write 'no increase of' or 'no decrease of'.")
        falls = what == "decrease" or (what == "improvement" and lower)
        return _Stale(text, metric, int(match["steps"]), operator.lt if falls else operator.gt)
    if match := _NAN.fullmatch(text):
        return _Nan(text, match["metric"])
    if match := _COMPARED.fullmatch(text):
        try:
            bound = float(match["bound"])
        except ValueError:
            raise ValueError(f"{text!r}: {match['bound']!r} is no number.") from None
        if math.isnan(bound):
            raise ValueError(f"{text!r}: write '{match['metric']} is nan'.")
        return _Comparison(text, match["metric"], _COMPARISONS[match["sign"]], bound)
    raise ValueError(
        f"{text!r} is no rule: write 'METRIC < NUMBER' (or <=, >, >=, ==, !=), 'METRIC is nan' or "
        "'no improvement of METRIC for N steps'."
    )


class Rules:
    """Watches the rows of a run.

    Args:
        texts: the rules.
        since_ns: values older than that, in Unix nanoseconds, are looked at, but told to nobody.
    """

    def __init__(self, texts: Sequence[str], since_ns: int = 0) -> None:
        self._since_ns = since_ns
        self._rules = [parse(text) for text in texts]
        self._left = [FIRES] * len(self._rules)

    def look(self, step: int, time_ns: int, values: Mapping[str, float]) -> list[Fired]:
        """What comes true with these values of that time."""
        fired = []
        for number, rule in enumerate(self._rules):
            value = rule.look(step, values)
            if value is not None and self._is_told(number, time_ns):
                fired.append(Fired(rule.text, step, value))
        return fired

    def nonfinite(self, rank: int, name: str, step: int, time_ns: int, value: float) -> list[Fired]:
        """What comes true with a rank's own value that is NaN or infinite, before it is reduced."""
        return [
            Fired(rule.text, step, value, rank)
            for number, rule in enumerate(self._rules)
            if isinstance(rule, _Nan) and rule.metric == name and rule.fires() and self._is_told(number, time_ns)
        ]

    def _is_told(self, number: int, time_ns: int) -> bool:
        told = self._left[number] > 0 and time_ns >= self._since_ns
        self._left[number] -= told
        return told
