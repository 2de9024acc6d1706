"""Rows thinned evenly, for a SwanLab run that takes less than is logged: series begin at the pace at which it can begin
them, and of each come points at a distance of steps that doubles until what is left is little enough. A series that has
few points keeps them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from swanlab_ray.actors.delivery.sink import Row

FARTHEST = 1 << 62
SERIES = 500
"""Series that may begin at once; those of a usual training."""
SERIES_PER_SECOND = 20
"""Further ones: SwanLab's local mode takes 10 to 30 ms for each (2 cores, SwanLab 0.10.3)."""


class Beginnings:
    """Which series have begun, and which wait until there is time for one more.

    Args:
        lose: told of each row's points of series that have not begun.
        clock: seconds.
    """

    def __init__(self, lose: Callable[[Row], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._lose = lose
        self._clock = clock
        self._begun: set[str] = set()
        self._room: float = SERIES
        self._then = clock()

    def keep(self, row: Row) -> Row:
        """What is kept of a row: the points of series that have begun, and of those that begin with it."""
        new = [name for name in row.values if name not in self._begun]
        if not new:
            return row
        now = self._clock()
        self._room = min(SERIES, self._room + (now - self._then) * SERIES_PER_SECOND)
        self._then = now
        begin, wait = new[: int(self._room)], new[int(self._room) :]
        self._begun.update(begin)
        self._room -= len(begin)
        return _without(row, set(wait), self._lose)


class Thinning:
    """Which points are kept.

    Args:
        lose: told of each row's points that are not.
    """

    def __init__(self, lose: Callable[[Row], None]) -> None:
        self._lose = lose
        self._distance = 1
        self._last: dict[str, int] = {}
        """The step of the last point of each series that was kept."""

    def keep(self, row: Row) -> Row:
        """What is kept of a row that comes."""
        if self._distance == 1:
            return row
        last, distance = self._last, self._distance
        close = set()
        for name in row.values:
            before = last.get(name)
            if before is None or abs(row.step - before) >= distance:
                last[name] = row.step
            else:
                close.add(name)
        return _without(row, close, self._lose)

    def thin(self, rows: deque[Row], size: int, bound: int) -> int:
        """Thin rows of so many bytes until they have no more than the bound; returns how many they have then. The
        first is left as it is: it is being written.
        """
        while size > bound and len(rows) > 1 and self._distance < FARTHEST:
            self._distance *= 2
            first = rows.popleft()
            self._last = dict.fromkeys(first.values, first.step)
            kept = [row for row in map(self.keep, rows) if row.values or row.table is not None]
            rows.clear()
            rows.extend([first, *kept])
            size = sum(row.size for row in rows)
        return size

    def relax(self) -> None:
        """There is room again."""
        self._distance = max(1, self._distance // 2)


def _without(row: Row, names: set[str], lose: Callable[[Row], None]) -> Row:
    """A row without the points of these series, which are lost."""
    if not names:
        return row
    lose(row._replace(values={name: row.values[name] for name in names}, table=None))
    return row._replace(values={name: value for name, value in row.values.items() if name not in names})
