"""What a writer finds of those before it: read once, again where it grew, and not taken for durable unsynced."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from swanlab_ray.actors.journal.files import Disk
from swanlab_ray.actors.journal.records import Batch, Entry, Header
from swanlab_ray.actors.journal.writing import Journal
from swanlab_ray.actors.membership import on_disk
from swanlab_ray.actors.membership.on_disk import AGAIN_S, OnDisk
from tests.journals import write_file
from tests.test_order import hello

LIFE = (0, "a" * 16)


def header(epoch: int) -> Header:
    return Header(kind="journal", run_id="r", epoch=epoch, host="h", pid=1, settings={})


def batch(seq: int, events: int = 1) -> Batch:
    return Batch(*LIFE, seq, 1, events, b"")


class SyncedDisk(Disk):
    """Notes down which files it is asked to sync, or fails."""

    def __init__(self) -> None:
        self.synced: list[str] = []
        self.fails = False

    def make_durable(self, path: Path) -> None:
        if self.fails:
            raise OSError(5, "Input/output error")
        self.synced.append(path.name)


class Incarnation:
    """A writer's journal beside one of an earlier writer, which has these entries."""

    def __init__(self, directory: Path, entries: list[Entry]) -> None:
        self.earlier = directory / "journal-000001.log"
        write_file(self.earlier, header(1), entries)
        self.disk = SyncedDisk()
        self.journal = Journal(directory, header, lambda error: None, lambda: None, self.disk)
        self.found = OnDisk(self.journal)

    def read(self) -> bool:
        summary = self.found.read()
        if summary is not None:
            self.found.join(summary)
        return summary is not None


def test_what_is_there_is_read_once_and_synced_and_again_where_it_grew(tmp_path: Path) -> None:
    made = Incarnation(tmp_path, [batch(0, 5), batch(1, 7), batch(1, 7)])
    assert made.read()
    assert made.disk.synced == ["journal-000001.log"], "the own file is not an earlier one"
    assert (made.found.readable, made.found.next(LIFE), made.found.events(LIFE)) == (True, 2, 12)
    assert not made.read()
    write_file(made.earlier, header(1), [batch(0, 5), batch(1, 7), batch(1, 7), batch(2, 100)])
    assert made.read()
    assert (made.found.next(LIFE), made.found.events(LIFE)) == (3, 112)
    assert made.found.events((1, "other")) == made.found.next((1, "other")) == 0


def test_what_this_writer_commits_counts_once_and_where_there_is_a_hole_it_is_due(tmp_path: Path) -> None:
    made = Incarnation(tmp_path, [batch(0, 5), batch(3, 5)])
    assert made.read()
    assert [made.found.due(hello(seq)) for seq in (0, 1, 2, 3, 9)] == [1, 1, 2, 4, 9]
    for seq in (1, 1, 3, 0):
        made.found.take(batch(seq, 10))
    assert made.found.events(LIFE) == 20
    assert made.found.due(hello(0)) == 2
    made.found.take(batch(2, 10))
    assert (made.found.due(hello(0)), made.found.events(LIFE)) == (4, 30)


def test_what_cannot_be_synced_is_no_reason_to_forget_it_and_is_tried_again(tmp_path: Path) -> None:
    made = Incarnation(tmp_path, [batch(0), batch(1)])
    made.disk.fails = True
    assert made.read()
    assert (made.found.readable, made.found.due(hello(0)), made.found.next(LIFE)) == (True, 0, 2)
    made.disk.fails = False
    write_file(made.earlier, header(1), [batch(0), batch(1), batch(2)])
    assert made.read()
    assert made.found.due(hello(0)) == 3


def test_files_that_cannot_be_read_are_left_alone_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Incarnation(tmp_path, [batch(0)])
    now = time.monotonic()
    monkeypatch.setattr(on_disk, "time", SimpleNamespace(monotonic=lambda: now))
    readable = made.earlier.read_bytes()
    made.earlier.write_bytes(readable.replace(b'"version":1', b'"version":9'))
    with monkeypatch.context() as patch:

        def fails(paths: list[Path]) -> None:
            raise OSError(5, "Input/output error")

        patch.setattr(on_disk, "summarise", fails)
        with pytest.raises(OSError, match="Input/output"):
            made.read()
    assert [made.found.readable] == [False]
    made.earlier.write_bytes(readable)
    now += AGAIN_S - 0.1
    assert not made.read()
    assert [made.found.readable] == [False]
    now += 0.2
    assert made.read()
    assert (made.found.readable, made.found.next(LIFE)) == (True, 1)
    write_file(made.earlier, header(1), [batch(0), batch(1)])
    assert made.read(), "it is readable again, so no time has to pass"
