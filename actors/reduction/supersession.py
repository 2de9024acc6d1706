"""What a training that was resumed, or that went back within a life of its process, has replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from swanlab_ray.actors.completions.buffers import TABLE
from swanlab_ray.actors.journal.batches import BatchReader
from swanlab_ray.actors.journal.records import Arrived, Batch
from swanlab_ray.actors.reduction.passes import Passes
from swanlab_ray.actors.reduction.spans import PREFIX, spans_of
from swanlab_ray.actors.reduction.written import NOBODY, Group, Written
from swanlab_ray.actors.runs.finding import RunFiles
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.actors.wire.events import RANK, Completions, Event, Progress, Scalars, Spans


class Supersession:
    """Which values a later pass of a rank's training has replaced.

    A training that is resumed from a checkpoint runs some steps again. From the first step on at which a later pass
    logs a name, what earlier ones of that rank logged under that name does not stand any more. A pass is a life of the
    rank's process, or, where the training goes back within it, a part of that.
    """

    def __init__(self) -> None:
        self._passes: dict[int, list[str]] = {}
        self._first: dict[tuple[int, str], dict[str, int]] = {}
        self._turns: dict[tuple[int, str], list[tuple[int, int]]] = {}
        self._replaced: dict[int, tuple[str, dict[str, int]]] = {}  # of each rank the answer that was asked for last

    def arrived(self, rank: int, life: str) -> bool:
        """A life begins; whether it is a new one."""
        passes = self._passes.setdefault(rank, [])
        if life in passes:
            return False
        passes.append(life)
        return True

    def turned(self, rank: int, life: str, seq: int, index: int) -> None:
        """With this event of this batch the training has gone back, in the latest life of the rank."""
        turns = self._turns.setdefault((rank, life), [])
        turns.append((seq, index))
        self._passes.setdefault(rank, [life]).append(_pass(life, len(turns)))

    def latest(self, rank: int, life: str) -> str:
        """The pass that this life is in, while the run is read."""
        return _pass(life, len(self._turns.get((rank, life), ())))

    def parts(self, batch: Batch, events: list[Event]) -> Iterator[tuple[str, list[Event]]]:
        """A batch's events by the pass that they belong to; at least one part."""
        turns = self._turns.get((batch.rank, batch.life), [])
        begun = sum(seq < batch.seq for seq, _ in turns)
        at = 0
        for index in (index for seq, index in turns if seq == batch.seq):
            yield _pass(batch.life, begun), events[at:index]
            begun, at = begun + 1, index
        yield _pass(batch.life, begun), events[at:]

    def logged(self, rank: int, life: str, event: Event) -> None:
        """Take note of what a pass that is not the first has logged."""
        passes = self._passes.get(rank)
        if not passes or passes[0] == life:
            return
        first = self._first.setdefault((rank, life), {})
        for step, name in _logged(event):
            first[name] = min(step, first.get(name, step))
        self._replaced.pop(rank, None)

    def stands(self, rank: int, life: str, step: int, name: str) -> bool:
        """Whether what this pass has logged at this step under this name has not been replaced."""
        return step < self._replaced_from(rank, life).get(name, step + 1)

    def standing(self, rank: int, life: str, scalars: Scalars) -> Scalars | None:
        """What is left of these values; None if nothing is."""
        replaced, step = self._replaced_from(rank, life), scalars.step
        if not replaced:
            return scalars
        kept = {name: value for name, value in scalars.values.items() if step < replaced.get(name, step + 1)}
        if len(kept) == len(scalars.values):
            return scalars
        return Scalars(scalars.step, scalars.time_ns, scalars.scope, kept) if kept else None

    def _replaced_from(self, rank: int, life: str) -> dict[str, int]:
        """From which step on later passes have logged a name."""
        asked, replaced = self._replaced.get(rank, ("", {}))
        if asked != life:
            passes, replaced = self._passes.get(rank, []), {}
            for later in passes[passes.index(life) + 1 :] if life in passes else []:
                for name, step in self._first.get((rank, later), {}).items():
                    replaced[name] = min(step, replaced.get(name, step))
            self._replaced[rank] = life, replaced
        return replaced


def _pass(life: str, number: int) -> str:
    return f"{life}, pass {number}" if number else life


def _logged(event: Event) -> Iterator[tuple[int, str]]:
    match event:
        case Scalars():
            yield from ((event.step, name) for name in event.values)
        case Completions():
            yield event.step, TABLE
        case Spans():
            yield from ((span.step, PREFIX + span.name) for span in spans_of(event))


class _Turns:
    """Finds where the training of a rank goes back within a life."""

    def __init__(self) -> None:
        self._lives: dict[int, str] = {}
        self._written: dict[int, Written] = {}
        self._passes = Passes(lambda rank, scalars: self._written[rank].holds(rank, scalars.step, _ids(scalars)))

    def restart_rank(self, rank: int, life: str) -> None:
        """A new life begins."""
        self._lives[rank] = life
        self._written.pop(rank, None)
        self._passes.restart_rank(rank)

    def look(self, rank: int, life: str, event: Event) -> bool:
        """Whether the rank has gone back when it logs this."""
        if self._lives.setdefault(rank, life) != life:
            return False  # of a life that is over
        written = self._written.setdefault(rank, Written())
        back = None
        if isinstance(event, Scalars):
            back = event.step if self._passes.goes_back(rank, event) else None
        elif isinstance(event, Progress):
            back = event.step + 1 if self._passes.says_it_is_at(rank, event.step) else None
        if back is not None:
            written.rewind(rank, back)
        if isinstance(event, Scalars):
            written.add(event.step, _ids(event), Group(frozenset({rank}), NOBODY))
        return back is not None


def _ids(scalars: Scalars) -> frozenset[str]:
    """What is measured on a rank is apart from what the user logs under the same name."""
    return frozenset(f"ranks/{name}" for name in scalars.values) if scalars.scope == RANK else frozenset(scalars.values)


def supersession(run: RunFiles) -> Supersession:
    """Read a run for the lives that replace others, and for trainings that went back."""
    found, turns, batches = Supersession(), _Turns(), BatchReader()
    for entry in merged(run):
        if isinstance(entry, Arrived):
            if found.arrived(entry.rank, entry.life):
                turns.restart_rank(entry.rank, entry.life)
        elif isinstance(entry, Batch):
            for index, event in enumerate(batches.events(entry)):
                if turns.look(entry.rank, entry.life, event):
                    found.turned(entry.rank, entry.life, entry.seq, index)
                with suppress(ValueError, IndexError):  # an odd event, of which the reduction tells
                    found.logged(entry.rank, found.latest(entry.rank, entry.life), event)
    return found
