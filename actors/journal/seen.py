"""Which batches were seen, and in which order they are taken: by their numbers, whatever a disk has made of them."""

from __future__ import annotations

from bisect import bisect
from typing import Generic, TypeVar

from swanlab_ray.actors.journal.records import Arrived, Batch, Ended, Entry, Finished
from swanlab_ray.actors.wire.messages import WINDOW

LifeKey = tuple[int, str]
"""Rank and life."""
Item = TypeVar("Item")


class Numbers:
    """Which numbers have been seen: as ranges, since nearly all come in order."""

    def __init__(self) -> None:
        self._ranges: list[list[int]] = []  # [first, last], rising, never touching

    def add(self, number: int) -> bool:
        """Whether it is new."""
        ranges = self._ranges
        if ranges and ranges[-1][1] + 1 == number:
            ranges[-1][1] = number
            return True
        at = bisect(ranges, [number, 1 << 63])
        if at and number <= ranges[at - 1][1]:
            return False
        ranges.insert(at, [number, number])
        if at + 1 < len(ranges) and ranges[at + 1][0] == number + 1:
            ranges[at][1] = ranges.pop(at + 1)[1]
        if at and ranges[at - 1][1] + 1 == number:
            ranges[at - 1][1] = ranges.pop(at)[1]
        return True

    @property
    def next(self) -> int:
        """One more than the highest."""
        return self._ranges[-1][1] + 1 if self._ranges else 0

    def missing(self) -> list[tuple[int, int]]:
        """The ranges that are not there below the highest, both ends included."""
        ends = [-1, *(last for _, last in self._ranges)]
        gaps = zip(ends, (first for first, _ in self._ranges), strict=False)
        return [(end + 1, first - 1) for end, first in gaps if first > end + 1]

    def missing_from(self, number: int) -> int:
        """The first from this one on that is not there."""
        at = bisect(self._ranges, [number, 1 << 63])
        return max(number, self._ranges[at - 1][1] + 1) if at else number

    def join(self, other: Numbers) -> None:
        """Take those of another in."""
        ranges: list[list[int]] = []
        for first, last in sorted(self._ranges + other._ranges):
            if ranges and first <= ranges[-1][1] + 1:
                ranges[-1][1] = max(last, ranges[-1][1])
            else:
                ranges.append([first, last])
        self._ranges = ranges


class Sequence:
    """Which batches of each life have been seen, so that each is taken once."""

    def __init__(self) -> None:
        self.lives: dict[LifeKey, Numbers] = {}

    def of(self, life: LifeKey) -> Numbers:
        """Those of one life."""
        numbers = self.lives.get(life)
        if numbers is None:
            numbers = self.lives[life] = Numbers()
        return numbers

    def take(self, batch: Batch) -> bool:
        """Whether this batch is new. Batches of a life come in order, but for gaps that are filled later."""
        return self.of((batch.rank, batch.life)).add(batch.seq)


class InOrder(Generic[Item]):
    """Entries as they come, but each batch once, and the batches of a life in the order of their numbers.

    After a power loss a journal may have batches that lie behind a hole. They were not acknowledged, so their rank
    sends them again after those that the hole has taken; until then they are held. A rank has no more than
    :data:`WINDOW` batches under way: one that is so far beyond a gap says that nothing will fill that.
    """

    def __init__(self) -> None:
        self._sequence = Sequence()
        self._due: dict[LifeKey, int] = {}
        self._held: dict[LifeKey, dict[int, Item]] = {}

    def take(self, entry: Entry, item: Item) -> list[Item]:
        """What is to be taken now that this entry has come: ``item`` stands for it."""
        if isinstance(entry, Batch):
            return self._batch((entry.rank, entry.life), entry.seq, item) if self._sequence.take(entry) else []
        if self._held:
            if isinstance(entry, Ended):
                return [*self._release([key for key in self._held if key == (entry.rank, entry.life)]), item]
            if isinstance(entry, Arrived):
                over = [key for key in self._held if key[0] == entry.rank and key[1] != entry.life]
                return [*self._release(over), item]
            if isinstance(entry, Finished):
                return [*self.rest(), item]
        return [item]

    def rest(self) -> list[Item]:
        """What is still held: there are no more entries."""
        return self._release(list(self._held))

    def _batch(self, life: LifeKey, seq: int, item: Item) -> list[Item]:
        due = self._due.get(life, 0)
        held = self._held.get(life)
        if held is None and seq <= due:
            self._due[life] = max(due, seq + 1)
            return [item]
        if seq < due:
            return [item]
        held = self._held.setdefault(life, {})
        held[seq] = item
        ready: list[Item] = []
        while held:
            if due in held:
                ready.append(held.pop(due))
                due += 1
            elif max(held) - due >= WINDOW:
                due = min(held)
            else:
                break
        if not held:
            del self._held[life]
        self._due[life] = due
        return ready

    def _release(self, lives: list[LifeKey]) -> list[Item]:
        released: list[Item] = []
        for life in lives:
            held = self._held.pop(life)
            self._due[life] = max(held) + 1
            released += [held[seq] for seq in sorted(held)]
        return released
