"""Sentences for the users of a run: in the writer's log, and each once in the journal and on rank 0."""

from __future__ import annotations

from swanlab_ray.actors.journal.records import Alert
from swanlab_ray.actors.journal.writing import Journal
from swanlab_ray.actors.log import log
from swanlab_ray.actors.wire.secret_shapes import masked


class Notices:
    """What concerns the whole run.

    Args:
        journal: keeps each sentence.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.all: list[str] = []
        self.told = 0
        """How many of them rank 0 has been told."""

    def __call__(self, sentence: str) -> None:
        """Tell a sentence, once."""
        sentence = masked(sentence)
        if sentence not in self.all:
            self.all.append(sentence)
            self._journal.append(Alert(text=sentence))
        log(sentence)

    def take(self) -> list[str]:
        """Those that rank 0 has not been told."""
        new = self.all[self.told :]
        self.told += len(new)
        return new
