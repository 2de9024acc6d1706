"""Rows thinned evenly, for a SwanLab run that takes less than is logged: of each series, points at a distance of steps
that doubles until what is left is little enough. A series that has few points keeps them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from swanlab_ray.actors.sink import Row

FARTHEST = 1 << 62


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
        kept = {}
        for name, value in row.values.items():
            before = last.get(name)
            if before is None or abs(row.step - before) >= distance:
                last[name] = row.step
                kept[name] = value
        if len(kept) == len(row.values):
            return row
        self._lose(
            row._replace(values={name: row.values[name] for name in row.values.keys() - kept.keys()}, table=None)
        )
        return row._replace(values=kept)

    def thin(self, rows: deque[Row], weighs: int, bound: int) -> int:
        """Thin rows of this weight until they weigh no more than the bound; returns what they weigh then. The first is
        left as it is: it is being written.
        """
        while weighs > bound and len(rows) > 1 and self._distance < FARTHEST:
            self._distance *= 2
            first = rows.popleft()
            self._last = dict.fromkeys(first.values, first.step)
            kept = [row for row in map(self.keep, rows) if row.values or row.table is not None]
            rows.clear()
            rows.extend([first, *kept])
            weighs = sum(row.weight for row in rows)
        return weighs

    def relax(self) -> None:
        """There is room again."""
        self._distance = max(1, self._distance // 2)
