"""Rows on their way into an experiment, without what the cloud refuses for good: a refused request is halved, by name
first, until the names or values that are to blame stand alone. Everything else arrives.

A refusal only counts while the cloud takes something else of the same kind: where it refuses all, it is the cloud that
is out of order, not the names.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from swanlab_ray.actors.delivery.sink import Row
from swanlab_ray.actors.swanlab.experiment import CloudError, CloudExperiment, Point, Refused, ServerError
from swanlab_ray.actors.swanlab.limits import Limits, shown

Send = Callable[[list[Any]], None]
ASKED = 8
"""Items that are tried one by one of a cloud that has taken none so far: does it take any?"""


class Withheld(NamedTuple):
    """What the cloud did not take."""

    scalars: int = 0
    completions: int = 0


class Delivery:
    """Brings rows to an experiment.

    Args:
        experiment: is filled.
        limits: tells the user of names and values, each once.
        notice: takes a sentence for the user.
    """

    def __init__(self, experiment: CloudExperiment, limits: Limits, notice: Callable[[str], None]) -> None:
        self._experiment = experiment
        self._limits = limits
        self._notice = notice
        self._refused: set[str] = set()
        self._suspects: set[str] = set()
        """Names of which one value was refused, the only one there was then."""
        self._blame = False
        self.known_point: Point | None = None
        """One that the cloud has taken, to ask whether it takes anything."""

    def deliver(self, rows: list[Row], blame: bool = False) -> Withheld:
        """Send rows; what the cloud refuses is remembered, told and counted.

        Args:
            blame: take answers of 5xx for refusals, since these rows have failed again and again.

        Raises:
            CloudError: the cloud cannot be used at present; the rows may be sent again.
        """
        self._blame = blame
        points = [Point(key, row.step, row.time_ns, value) for row in rows for key, value in row.values.items()]
        self._make_series(list(dict.fromkeys(point.key for point in points)))
        asked = [point for point in points if point.key not in self._refused]
        refused = self._send_points(asked)
        lost = sum(len(row.table.rows) for row in rows if row.table is not None and not self._send_table(row))
        return Withheld(len(points) - len(asked) + len(refused), lost)

    def config(self, values: dict[str, Any]) -> None:
        """Add to the configuration; a part that the cloud refuses costs no other.

        Raises:
            CloudError: the cloud cannot be used at present.
        """

        def send(names: list[str]) -> None:
            self._experiment.update_config({name: values[name] for name in names})

        try:
            send(list(values))
        except Refused as error:
            for name, reason in _halve(send, list(values), error).items():
                self._notice(
                    f"The SwanLab cloud does not take '{shown(name)}' of this run's configuration ({reason}); the "
                    "journal has it."
                )

    def _make_series(self, names: list[str]) -> None:
        new = [name for name in names if name not in self._refused and not self._experiment.has(name)]
        for name, reason in self._sift(self._experiment.add_series, new, self._experiment.a_series).items():
            self._refuse(name, reason)

    def _send_points(self, points: list[Point]) -> dict[Point, Refused]:
        by_name = sorted(points, key=lambda point: point.key)  # those of a name stay in their order
        refused = self._sift(self._experiment.add_points, by_name, self.known_point)
        if points and points[-1] not in refused:
            self.known_point = points[-1]
        if refused:
            self._remember(refused, {point.key for point in points if point not in refused})
        return refused

    def _remember(self, refused: dict[Point, Refused], taken: set[str]) -> None:
        """Tell of refused values, and do not send names again of which none was taken."""
        for point, reason in refused.items():
            self._limits.tell(
                point.key,
                f"The SwanLab cloud does not take some values of '{shown(point.key)}' ({reason}); the journal has "
                "them.",
            )
        for name, times in Counter(point.key for point in refused if point.key not in taken).items():
            (self._refused if times > 1 or name in self._suspects else self._suspects).add(name)
        self._suspects -= taken

    def _send_table(self, row: Row) -> bool:
        try:
            self._experiment.add_table(row)
        except Refused as error:
            series = self._experiment.a_series
            if series is None:
                raise CloudError(str(error)) from error
            _ask(self._experiment.add_series, [series])
            self._notice(f"The SwanLab cloud does not take some completions ({error}); the journal has them.")
            return False
        return True

    def _refuse(self, name: str, reason: Refused) -> None:
        self._refused.add(name)
        self._limits.tell(
            name, f"The SwanLab cloud does not take '{shown(name)}' ({reason}): its values are in the journal only."
        )

    def _sift(self, send: Send, items: list[Any], known: Any) -> dict[Any, Refused]:
        """Send items; returns those that are refused.

        Raises:
            CloudError: also where all are refused, and what the cloud has taken before as well.
        """
        if not items:
            return {}
        if self._blame:
            send = _blaming(send)
        try:
            send(items)
        except Refused as error:
            # Where it has taken nothing yet, a few of these, others each time.
            taken = _ask(send, random.sample(items, min(len(items), ASKED)) if known is None else [known])
            refused = _halve(send, items, error)
            _ask(send, [taken])  # it was in order all the while
            return refused
        return {}


def _ask(send: Send, items: list[Any]) -> Any:
    """The first of these items that the cloud takes, one by one.

    Raises:
        CloudError: it takes none of them.
    """
    for item in items:
        try:
            send([item])
        except Refused as error:
            refused = error
        else:
            return item
    raise CloudError(str(refused)) from refused


def _blaming(send: Send) -> Send:
    def blaming(items: list[Any]) -> None:
        try:
            send(items)
        except ServerError as error:
            raise Refused(str(error)) from error

    return blaming


def _halve(send: Send, items: list[Any], error: Refused) -> dict[Any, Refused]:
    """Those of refused items that are to blame. All of a name, where its first and its last are."""
    if len(items) == 1:
        return {items[0]: error}
    names = [item.key if isinstance(item, Point) else item for item in items]
    middle = len(items) // 2
    if names[0] != names[-1]:
        middle = names.index(names[middle]) or names.count(names[0])
    elif len(items) > 2:
        ends = _send_each(send, [[items[0]], [items[-1]]])
        if len(ends) == 2:
            return dict.fromkeys(items, error)
        return ends | _send_each(send, [items[1:-1]])
    return _send_each(send, [items[:middle], items[middle:]])


def _send_each(send: Send, parts: list[list[Any]]) -> dict[Any, Refused]:
    refused: dict[Any, Refused] = {}
    for part in parts:
        try:
            send(part)
        except Refused as error:
            refused |= _halve(send, part, error)
    return refused
