"""Where the training of a rank goes back, within one life of its process, to steps that it has run already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from swanlab_ray.actors.wire.events import Scalars


@dataclass(slots=True)
class _Place:
    first: int
    """The lowest step that the rank has logged."""
    said: int = -1
    """The latest one that it has said it is at."""
    counted: int = -1
    """Where the steps have begun anew: the latest one that was logged again; -1: they have not."""


class Passes:
    """Tells a training that goes back to a checkpoint from one that counts its steps anew.

    A rank that logs a name again, at a step below its highest one, has gone back: from there on its later values stand.
    One that goes back to its first step counts them anew, as for each epoch; then every value is one of its own, and
    none may take the place of another.

    Args:
        logged: ``logged(rank, scalars)``: whether the rank has logged one of these names at this step.
    """

    def __init__(self, logged: Callable[[int, Scalars], bool]) -> None:
        self._logged = logged
        self._places: dict[int, _Place] = {}
        self.highest: dict[int, int] = {}
        """The highest step that each rank has logged. Whoever sees a higher one may raise it instead of asking."""

    def restart_rank(self, rank: int) -> None:
        """A new life of this rank begins."""
        self._places.pop(rank, None)
        self.highest.pop(rank, None)

    def goes_back(self, rank: int, scalars: Scalars) -> bool:
        """Whether a rank that logs this has gone back to this step."""
        step = scalars.step
        place = self._places.get(rank)
        if place is None or step >= self.highest[rank]:
            self._places.setdefault(rank, _Place(step))
            self.highest[rank] = step
            return False
        if not self._logged(rank, scalars):
            place.first = min(place.first, step)
            return False
        return self._judge(rank, place, step)

    def says_it_is_at(self, rank: int, step: int) -> bool:
        """Whether a rank that says it is at this step has gone back, to run the next one again."""
        place = self._places.get(rank)
        if place is None:
            return False
        before, place.said = place.said, step
        return step < before and step < self.highest[rank] and self._judge(rank, place, step + 1)

    def _judge(self, rank: int, place: _Place, step: int) -> bool:
        if step <= place.first or 0 <= place.counted <= step:
            place.counted = step
            return False
        self.highest[rank], place.counted = step, -1
        return True
