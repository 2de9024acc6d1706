"""What waits at a step for ranks that have not reported it."""

from __future__ import annotations

from dataclasses import dataclass, field

from swanlab_ray.actors.reduction.over_ranks import Name, Shape
from swanlab_ray.actors.reduction.written import NOBODY
from swanlab_ray.actors.wire.events import Scalars


@dataclass(slots=True)
class Waiting:
    """Values of one name at one step, by rank."""

    scope: int
    time_ns: int
    since: float
    name: Name
    again: bool = False
    """It was written before, by a training that has gone back since."""
    by_rank: dict[int, float] = field(default_factory=dict)
    back: frozenset[int] = NOBODY
    """Ranks that have gone back since they logged this, and may log it again."""


@dataclass(slots=True)
class Calls:
    """The same for all names of a shape, while every rank logs them in one call."""

    since: float
    again: bool = False
    by_rank: dict[int, Scalars] = field(default_factory=dict)
    back: frozenset[int] = NOBODY


@dataclass(slots=True)
class Row:
    """What waits at one step: call by call, and by name where ranks log the same names in different calls."""

    since: float
    """When what waits longest came."""
    behind: bool
    """Every rank was beyond this step before the first value of it came, so that says nothing: it is counted apart,
    as epochs are, or logged late."""
    mixed: bool
    """Something of this step is written, or may be."""
    calls: dict[Shape, Calls] = field(default_factory=dict)
    names: dict[str, Waiting] = field(default_factory=dict)

    def all(self) -> list[Calls | Waiting]:
        """Everything that waits here."""
        return [*self.calls.values(), *self.names.values()]

    def rewind(self, rank: int) -> None:
        """This rank has gone back: what it has logged here it may log again."""
        for waiting in self.all():
            if rank in waiting.by_rank:
                waiting.back |= {rank}

    def has(self, id_: str) -> bool:
        """Whether this name waits here."""
        return id_ in self.names or any(id_ in shape.ids for shape in self.calls)

    def holds(self, rank: int, ids: frozenset[str]) -> bool:
        """Whether this rank has logged one of these names here, and has not gone back since."""
        waiting: list[Calls | Waiting] = [self.names[key] for key in ids & self.names.keys()]
        waiting += [calls for shape, calls in self.calls.items() if not ids.isdisjoint(shape.ids)]
        return any(rank in one.by_rank and rank not in one.back for one in waiting)
