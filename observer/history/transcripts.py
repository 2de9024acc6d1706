"""What a run's model was shown and has said, from the run's journal."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby

from swanlab_ray.actors.completions.buffers import TABLE, CompletionRow, rows_of
from swanlab_ray.actors.completions.tables import Decoder, Shown
from swanlab_ray.actors.journal.batches import BatchReader
from swanlab_ray.actors.journal.records import Batch
from swanlab_ray.actors.reduction.supersession import supersession
from swanlab_ray.actors.runs.finding import RunFiles
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.actors.wire.events import Completions, Tokenizer


def completions(run: RunFiles, last: int | None = None) -> Iterator[dict[str, Shown]]:
    """Rows of all ranks, whole texts, by step and rank; without those that a resumed training has replaced.

    Args:
        run: its files.
        last: only so many, the latest ones.
    """
    kept: dict[int, deque[CompletionRow]] = {}
    decoder = Decoder()
    superseded, batches = supersession(run), BatchReader()
    for entry in merged(run):
        if not isinstance(entry, Batch):
            continue
        for life, part in superseded.parts(entry, batches.events(entry)):
            for event in part:
                if isinstance(event, Tokenizer):
                    decoder.learn(event)
                elif isinstance(event, Completions) and superseded.stands(entry.rank, life, event.step, TABLE):
                    kept.setdefault(entry.rank, deque(maxlen=last)).extend(rows_of(entry.rank, event))
    # The n-th rows of all ranks side by side, so that the latest few are of all of them.
    counted = [(row.step, number, row) for rows in kept.values() for number, row in _numbered(rows)]
    counted.sort(key=lambda item: (item[0], item[1], item[2].rank))
    for row in sorted((row for _, _, row in counted[-(last or 0) :]), key=lambda row: (row.step, row.rank)):
        shown: dict[str, Shown] = {"step": row.step, "rank": row.rank}
        if row.algorithm:
            shown["algorithm"] = row.algorithm
        for name, cell in row.cells.items():
            shown[f"{name}_" if name in shown else name] = decoder.text(cell, row.tokenizer)
        yield shown


def _numbered(rows: Iterable[CompletionRow]) -> Iterator[tuple[int, CompletionRow]]:
    """Rows of one rank, counted from the end of each step."""
    for _, of_step in groupby(rows, key=lambda row: row.step):
        step = list(of_step)
        yield from zip(range(-len(step), 0), step, strict=True)
