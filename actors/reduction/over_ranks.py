"""What a name becomes over ranks: its series, and their values at a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan

from swanlab_ray.actors.reduction.written import EMPTY, Group
from swanlab_ray.actors.wire.events import RANK, USER, Scalars

OVER_RANKS = ("mean", "min", "max", "p95", "argmax")
"""What is computed over ranks: ``p95`` is that of the nearest rank, ``argmax`` the lowest rank that has the maximum.
``nonfinite`` counts the ranks that reported NaN or infinity, where there are any."""
SHAPES = 1_000
"""Sets of names that are known by heart."""


class Name(dict[int, str]):
    """What is the same for a name at every step: its series, by rank, and over ranks.

    What the user logs and what is measured on a rank may have the same name; they are kept apart.
    """

    def __init__(self, name: str, scope: int) -> None:
        self.name = name
        self.over_ranks = [f"ranks/{name}/{what}" for what in OVER_RANKS]
        self.id = self.over_ranks[0] if scope == RANK else name
        self.reporters: set[int] = set()
        """Ranks that have ever logged it."""
        self.silent: set[int] = set()
        """Those of them that were waited for in vain since they did."""
        self.known = False
        """It was written before: who reports it is known."""
        self.measured = False
        """It is the user's, and the series over ranks are those of the measurement of that name."""

    def __missing__(self, rank: int) -> str:
        series = self[rank] = f"rank/{rank}/{self.name}"
        return series


@dataclass(slots=True, eq=False)
class Shape:
    """What is the same for calls of the same names in the same order."""

    scope: int
    names: list[Name]
    ids: frozenset[str]
    reporters: set[int] = field(default_factory=set)
    """Ranks that are expected to log it."""
    ranks: list[int] = field(default_factory=list)
    """Those that logged it last; mostly they are the same at every step."""
    group: Group = EMPTY
    keys: list[list[str]] = field(default_factory=list)
    """Of each name, the series of these ranks and over them."""
    known: bool = False
    """All of its names are."""

    def report(self, rank: int) -> None:
        """This rank logs them."""
        self.reporters.add(rank)
        for name in self.names:
            name.reporters.add(rank)
            name.silent.discard(rank)


class Names:
    """All names, and the shapes of calls that were seen."""

    def __init__(self) -> None:
        self._names: dict[str, Name] = {}
        self.shapes: dict[tuple[int, *tuple[str, ...]], Shape] = {}
        """By scope and names."""

    def name(self, key: str, scope: int) -> Name:
        """The name of this key."""
        name = self._names.get(key if scope != RANK else f"ranks/{key}/mean")
        if name is None:
            name = Name(key, scope)
            self._names[name.id] = name
            twin = self._names.get(key if scope == RANK else name.over_ranks[0])
            if twin is not None:
                (twin if scope == RANK else name).measured = True
        return name

    def shape(self, scalars: Scalars) -> Shape:
        """The shape of this call."""
        shape = self.shapes.get((scalars.scope, *scalars.values))
        if shape is None:
            if len(self.shapes) >= SHAPES:
                self.shapes.clear()
            names = [self.name(key, scalars.scope) for key in scalars.values]
            shape = Shape(scalars.scope, names, frozenset(name.id for name in names))
            self.shapes[scalars.scope, *scalars.values] = shape
        return shape

    def give_up(self, name: Name, ranks: Iterable[int]) -> None:
        """These ranks are not expected to log this name until they do so again."""
        for rank in ranks:
            name.silent.add(rank)
            for shape in self.shapes.values():
                if name.id in shape.ids:
                    shape.reporters.discard(rank)


def put(
    values: dict[str, float],
    name: Name,
    keys: list[str],
    scope: int,
    ranks: list[int],
    column: Sequence[float],
) -> int | None:
    """Add the series of one name to a row; returns the lowest rank whose value is NaN or infinite, if there is one.

    Args:
        values: the row.
        keys: the series of those of these ranks that have some, and then those over ranks.
        ranks: in order, so that those with a series come first.
        column: the value of each.
    """
    shown = len(keys) - len(OVER_RANKS)
    if len(name.reporters) == 1:
        if scope == USER:
            values[name.name] = column[0]
        else:
            values.update(zip(keys, column[:shown], strict=False))
        return None if isfinite(column[0]) else ranks[0]
    reduced, nonfinite = over_ranks(ranks, column)
    if scope == USER:
        values[name.name] = reduced[0]
    if scope != USER or not name.measured:
        values.update(zip(keys, (*column[:shown], *reduced), strict=False))
        if nonfinite:
            values[f"ranks/{name.name}/nonfinite"] = float(nonfinite)
    return next(rank for rank, value in zip(ranks, column, strict=True) if not isfinite(value)) if nonfinite else None


def over_ranks(ranks: Sequence[int], column: Sequence[float]) -> tuple[list[float], int]:
    """The values of :data:`OVER_RANKS` over those that are finite, and how many are not; only NaN where none is.

    Args:
        ranks: in order.
        column: the value of each.
    """
    ordered = sorted(column)
    total, nonfinite = sum(ordered), 0
    if not isfinite(total):
        ordered = sorted(filter(isfinite, column))
        nonfinite = len(column) - len(ordered)
        if not ordered:
            return [nan], nonfinite
        total = sum(ordered)
    count, highest = len(ordered), ordered[-1]
    # The sum may overflow although no value does.
    mean = total / count if isfinite(total) else sum(value / count for value in ordered)
    p95 = ordered[count - count // 20 - 1]
    return [mean, ordered[0], highest, p95, float(ranks[column.index(highest)])], nonfinite
