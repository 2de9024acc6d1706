"""A run's journal and its spools as one stream: by time, as far as the numbers of the batches leave that open.

A spool says when each of its batches was put aside, by its machine's clock, and the journal when each was taken, by the
writer's; the two may differ by hours. A batch of a spool comes after those of its life in the journal that are before
it by number, before those that are after it, and before the next life of its rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from swanlab_ray.actors.journal.reading import Damaged, entries
from swanlab_ray.actors.journal.records import Arrived, Batch, Entry, Header
from swanlab_ray.actors.journal.seen import InOrder, LifeKey
from swanlab_ray.actors.runs.finding import RunFiles


class _Place(NamedTuple):
    """Orders the entries of all files."""

    moment: int
    """Unix nanoseconds; within a stream it never goes back, whatever its clock did."""
    number: float
    """Of the entry in the journal that this one is, is just before or just after; infinite: after all of the moment."""
    side: int
    """Before that entry: -1, it itself: 0, after it: 1."""


class _Range(NamedTuple):
    """Batches of a life that follow each other in the journal, and the places of the first and the last."""

    first: int
    last: int
    begin: _Place
    end: _Place


def interleave(
    journals: list[Path], spools: list[Path], read: Callable[[Path], Iterable[Entry | Damaged]]
) -> Iterator[Entry | Damaged]:
    """All entries of these files. Where there are spools, the journals are read twice."""

    def of_journals() -> Iterator[tuple[_Place, Entry | Damaged]]:
        moment = 0
        for number, entry in enumerate(entry for path in journals for entry in read(path)):
            moment = max(moment, _time(entry))
            yield _Place(moment, number, 0), entry

    if not spools:
        yield from (entry for _, entry in of_journals())
        return
    bounds = _Bounds(of_journals())

    def of_spool(path: Path) -> Iterator[tuple[_Place, Entry | Damaged]]:
        place = _Place(0, -1, 0)
        for entry in read(path):
            if not isinstance(entry, Header):  # which has the time at which the file was begun
                place = max(place, bounds.within(entry, _Place(max(place.moment, _time(entry)), float("inf"), 1)))
            yield place, entry

    for _, entry in heapq.merge(of_journals(), *map(of_spool, spools), key=lambda found: found[0]):
        yield entry


def _time(entry: Entry | Damaged) -> int:
    return entry.received_ns if isinstance(entry, Batch) else getattr(entry, "time_ns", 0)


class _Bounds:
    """Between which entries of the journal a batch of a spool belongs."""

    def __init__(self, journal: Iterable[tuple[_Place, Entry | Damaged]]) -> None:
        self._ranges: dict[LifeKey, list[_Range]] = {}
        self._over: dict[LifeKey, _Place] = {}  # where the next life of the rank begins
        lives: dict[int, list[LifeKey]] = {}
        for place, entry in journal:
            if isinstance(entry, Batch):
                self._take(self._ranges.setdefault((entry.rank, entry.life), []), entry.seq, place)
            elif isinstance(entry, Arrived):
                earlier = lives.setdefault(entry.rank, [])
                for life in earlier:
                    if life[1] != entry.life:
                        self._over.setdefault(life, place)
                earlier.append((entry.rank, entry.life))

    @staticmethod
    def _take(ranges: list[_Range], seq: int, place: _Place) -> None:
        if ranges and ranges[-1].last + 1 == seq:
            ranges[-1] = ranges[-1]._replace(last=seq, end=place)
        else:
            ranges.append(_Range(seq, seq, place, place))

    def within(self, entry: Entry | Damaged, place: _Place) -> _Place:
        """The place nearest to this one that the entry can have."""
        if not isinstance(entry, Batch):
            return place
        life = entry.rank, entry.life
        ranges = self._ranges.get(life, ())
        later = [found.begin for found in ranges if found.first > entry.seq]
        later += [self._over[life]] if life in self._over else []
        if later:
            place = min(place, min(later)._replace(side=-1))
        # One that the journal has as well comes after that: it is passed over.
        earlier = [found.end for found in ranges if found.first <= entry.seq]
        return max(place, max(earlier)._replace(side=1)) if earlier else place


def merged(run: RunFiles) -> Iterator[Entry | Damaged]:
    """Everything that is known of a run: each batch once, and those of a life in the order of their numbers."""

    def read(path: Path) -> Iterator[Entry | Damaged]:
        with suppress(FileNotFoundError):  # a spool is removed once the writer has it all
            for found in entries(path):
                yield found if isinstance(found, Damaged) else found[1]

    order: InOrder[Entry] = InOrder()
    for found in interleave(run.journals, run.spools, read):
        if isinstance(found, Damaged):
            yield found
        else:
            yield from order.take(found, found)
    yield from order.rest()
