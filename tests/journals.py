"""Journals made by hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from swanlab_ray.actors.journal import Journal, run_directory
from swanlab_ray.actors.records import Entry, Header


def write_journal(log_dir: Path, run_id: str, entries: Iterable[Entry]) -> None:
    """The journal of a run whose writer has taken these entries."""

    def header(epoch: int) -> Header:
        return Header(kind="journal", run_id=run_id, epoch=epoch, host="h", pid=1, settings={"project": "p"})

    journal = Journal(run_directory(log_dir, run_id), header, lambda entries: None, lambda error: None, lambda: None)
    journal.start()
    for entry in entries:
        journal.append(entry)
    assert journal.close(60)
