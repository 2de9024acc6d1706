"""Journals made by hand."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path

from swanlab_ray.actors.journal.files import run_directory
from swanlab_ray.actors.journal.framing import frame
from swanlab_ray.actors.journal.records import Entry, Header, pack
from swanlab_ray.actors.journal.writing import Journal


def write_journal(log_dir: Path, run_id: str, entries: Iterable[Entry]) -> None:
    """The journal of a run whose writer has taken these entries."""

    def header(epoch: int) -> Header:
        return Header(
            kind="journal", run_id=run_id, epoch=epoch, host=socket.gethostname(), pid=1, settings={"project": "p"}
        )

    journal = Journal(run_directory(log_dir, run_id), header, lambda error: None, lambda: None)
    journal.start(lambda committed: None)
    for entry in entries:
        journal.append(entry)
    assert journal.close(60)


def write_file(path: Path, header: Header | None, entries: Iterable[Entry] = ()) -> None:
    """One file of records, as it lies on a disk: a journal without a writer, a spool, or one without a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b""
    for entry in [*([header] if header else []), *entries]:
        data += frame(pack(entry), len(data))
    path.write_bytes(data)
