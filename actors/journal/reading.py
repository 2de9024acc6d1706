"""Reading a journal back: the entries of its files in order, and what of them is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from swanlab_ray.actors.journal import framing
from swanlab_ray.actors.journal.files import journal_files
from swanlab_ray.actors.journal.records import Entry, Header, UnknownFormat, unpack
from swanlab_ray.actors.journal.writing import Position


@dataclass(frozen=True, slots=True)
class Damaged:
    """A place in a file that could not be read."""

    path: Path
    damage: framing.Damage


def entries(path: Path, start: int = 0, end: int | None = None) -> Iterator[tuple[int, Entry] | Damaged]:
    """The entries of one file with the offset after each, and its damage.

    Raises:
        UnknownFormat: the file is no journal, or of a newer version.
        OSError: it cannot be read.
    """
    for found in framing.read(path, start, end):
        if isinstance(found, framing.Damage):
            yield Damaged(path, found)
            continue
        try:
            entry = unpack(found.payload)
        except UnknownFormat as error:
            if found.offset == 0:
                raise UnknownFormat(f"'{path}' cannot be read: {error}") from None
            yield Damaged(path, framing.Damage(found.offset, found.end, str(error)))
            continue
        if start == 0 and found.offset == 0 and not isinstance(entry, Header):
            raise UnknownFormat(f"{path} is not a journal of swanlab-ray")
        if entry is not None:
            yield found.end, entry


class Follower:
    """Reads a journal from a place on, as far as it was committed, again and again.

    Args:
        directory: the run's directory.
        position: where to begin.
    """

    def __init__(self, directory: Path, position: Position) -> None:
        self.directory = directory
        self.position = position

    def read(self, until: Position) -> Iterator[Entry | Damaged]:
        """The entries from here to there. :attr:`position` moves along."""
        for epoch, path in journal_files(self.directory).items():
            if not self.position.epoch <= epoch <= until.epoch:
                continue
            start = self.position.offset if epoch == self.position.epoch else 0
            end = until.offset if epoch == until.epoch else None
            self.position = Position(epoch, start)
            for found in entries(path, start, end):
                if isinstance(found, Damaged):
                    yield found
                else:
                    self.position = Position(epoch, found[0])
                    yield found[1]
        self.position = max(self.position, until)
