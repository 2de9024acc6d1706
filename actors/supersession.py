"""What a training that was resumed has replaced."""

from __future__ import annotations

from collections.abc import Iterable

from swanlab_ray.actors.batches import BatchReader
from swanlab_ray.actors.completions import TABLE
from swanlab_ray.actors.history import RunFiles, merged
from swanlab_ray.actors.protocol import Completions, Scalars, Spans
from swanlab_ray.actors.records import Arrived, Batch
from swanlab_ray.actors.spans import PREFIX, spans_of


class Supersession:
    """Which values a later life of a rank has replaced.

    A training that is resumed from a checkpoint runs some steps again. From the first step on at which a later life
    logs a name, what earlier lives of that rank logged under that name does not stand any more.
    """

    def __init__(self) -> None:
        self._lives: dict[int, list[str]] = {}
        self._first: dict[tuple[int, str], dict[str, int]] = {}
        self.any = False

    def arrived(self, rank: int, life: str) -> None:
        """A life begins."""
        lives = self._lives.setdefault(rank, [])
        if life not in lives:
            lives.append(life)

    def logged(self, rank: int, life: str, step: int, names: Iterable[str]) -> None:
        """Take note of what a life that is not the first has logged."""
        lives = self._lives.get(rank)
        if not lives or lives[0] == life:
            return
        first = self._first.setdefault((rank, life), {})
        for name in names:
            if step < first.get(name, step + 1):
                first[name] = step
                self.any = True

    def stands(self, rank: int, life: str, step: int, name: str) -> bool:
        """Whether what this life has logged at this step under this name has not been replaced."""
        return all(step < first.get(name, step + 1) for first in self._later(rank, life))

    def standing(self, rank: int, life: str, scalars: Scalars) -> Scalars | None:
        """What is left of these values; None if nothing is."""
        if not self._later(rank, life):
            return scalars
        kept = {name: value for name, value in scalars.values.items() if self.stands(rank, life, scalars.step, name)}
        if len(kept) == len(scalars.values):
            return scalars
        return Scalars(scalars.step, scalars.time_ns, scalars.scope, kept) if kept else None

    def _later(self, rank: int, life: str) -> list[dict[str, int]]:
        """From which step on each later life has logged a name."""
        lives = self._lives.get(rank, [])
        if not self.any or life not in lives or lives[-1] == life:
            return []
        return [self._first.get((rank, other), {}) for other in lives[lives.index(life) + 1 :]]


def supersession(run: RunFiles) -> Supersession:
    """Read a run for the lives that replace others. Costs next to nothing where no rank was started twice."""
    found, batches = Supersession(), BatchReader()
    for entry in merged(run):
        if isinstance(entry, Arrived):
            found.arrived(entry.rank, entry.life)
        elif isinstance(entry, Batch) and found._lives.get(entry.rank, [entry.life])[0] != entry.life:
            for event in batches.events(entry):
                if isinstance(event, Scalars):
                    found.logged(entry.rank, entry.life, event.step, event.values)
                elif isinstance(event, Completions):
                    found.logged(entry.rank, entry.life, event.step, [TABLE])
                elif isinstance(event, Spans):
                    for span in spans_of(event):
                        found.logged(entry.rank, entry.life, span.step, [PREFIX + span.name])
    return found
