"""Which ranks' values are written, by step and name: what tells a late value, and one that is logged again, from a new
one. The lowest steps are forgotten beyond a bound; whatever comes for a step that low is late by definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from typing import NamedTuple

STEPS_KEPT = 10_000
"""Steps that are remembered."""
NAMES_KEPT = 2_000_000
"""The same for names, over all steps."""

NOBODY: frozenset[int] = frozenset()


class Group(NamedTuple):
    """Names of a step that were written together."""

    ranks: frozenset[int]
    """Whose values are in it."""
    back: frozenset[int]
    """Ranks that had values in it and run the step again."""


EMPTY = Group(NOBODY, NOBODY)
_NEVER: tuple[int, set[str]] = (-1, set())


class Written:
    """Remembers what was written."""

    def __init__(self) -> None:
        self._steps: dict[int, dict[frozenset[str], Group]] = {}
        self._heap: list[int] = []  # their numbers: the lowest goes first, whatever order they came in
        self._names = 0
        self._floors: dict[str, int] = {}  # of each name, the step below which all is forgotten
        # Of each rank its highest step that is forgotten, and what it has logged there since.
        self._below: dict[int, tuple[int, set[str]]] = {}
        self.floor = 0
        """The highest of the names' floors: from there on everything is remembered."""
        self.lowered = 0
        """Steps below this one may have been written before, although they are remembered as new."""
        self.certain = 0
        """The higher of both."""
        self.at = self._steps.get
        """``at(step)``: what of this step is written, by its names; None if nothing is."""

    def add(self, step: int, names: frozenset[str], group: Group) -> None:
        """These names are written at this step, with the values of these ranks."""
        groups = self._steps.get(step)
        if groups is None:
            groups = self._steps[step] = {}
            heappush(self._heap, step)
        groups[names] = group
        self._names += len(names)
        while len(self._heap) > STEPS_KEPT or (self._names > NAMES_KEPT and len(self._heap) > 1):
            self._forget(heappop(self._heap))

    def _forget(self, step: int) -> None:
        for names, group in self._steps.pop(step).items():
            for rank in group.ranks:
                if self._below.get(rank, _NEVER)[0] < step:
                    self._below[rank] = step, set()
            self._names -= len(names)
            self._floors |= dict.fromkeys((name for name in names if self._floors.get(name, 0) <= step), step + 1)
            self.floor = max(self.floor, step + 1)
        self.certain = max(self.floor, self.lowered)

    def find(self, step: int, name: str) -> Group | None:
        """With which ranks this name is written at this step; None if it is not, or that is forgotten."""
        return next((group for names, group in self._steps.get(step, {}).items() if name in names), None)

    def forgotten(self, step: int, name: str) -> bool:
        """Whether this is too long ago."""
        return step < self._floors.get(name, 0)

    def holds(self, rank: int, step: int, names: Iterable[str]) -> bool:
        """Whether one of these names is written at this step with the value of this rank, or may be."""
        groups = [(found, group) for found, group in self._steps.get(step, {}).items() if rank in group.ranks]
        return any(self.forgotten(step, name) or any(name in found for found, _ in groups) for name in names)

    def join(self, rank: int, step: int, late: frozenset[str]) -> None:
        """Late values of this rank are written beside the others."""
        groups = self._steps.get(step, {})
        for names, group in list(groups.items()):
            theirs = names & late
            if theirs:
                joined = Group(group.ranks | {rank}, group.back)
                self._split(groups, names, theirs)
                groups[theirs] = joined

    def first_below(self, rank: int, step: int, name: str) -> bool:
        """Whether a rank logs a forgotten step for the first time, as far as can be told."""
        latest, names = self._below.get(rank, _NEVER)
        if step > latest:
            self._below[rank] = step, {name}
            return True
        if step < latest or name in names or not names:
            return False
        names.add(name)
        return True

    def reopen(self, step: int, again: Iterable[str]) -> None:
        """These names of a step are reduced again."""
        groups, names = self._steps.get(step, {}), frozenset(again)
        for found in list(groups):
            theirs = found & names
            if theirs:
                self._split(groups, found, theirs)
                self._names -= len(theirs)

    @staticmethod
    def _split(groups: dict[frozenset[str], Group], names: frozenset[str], theirs: frozenset[str]) -> None:
        group = groups.pop(names)
        if len(theirs) < len(names):
            groups[names - theirs] = group

    def rewind(self, rank: int, step: int) -> None:
        """From this step on a rank runs its steps again."""
        made: dict[Group, Group] = {}
        for groups in self._from(step):
            for names, group in groups.items():
                if rank in group.ranks:
                    groups[names] = made.setdefault(group, Group(group.ranks - {rank}, group.back | {rank}))
        if step < self.floor:
            self.lowered = max(self.lowered, self.floor)
            self._floors = {name: min(floor, step) for name, floor in self._floors.items()}
            self.floor = step
            self.certain = self.lowered
        self._below.pop(rank, None)

    def _from(self, step: int) -> Iterator[dict[frozenset[str], Group]]:
        return (groups for number, groups in self._steps.items() if number >= step)
