"""A rank's spool: what waits is bounded, what is acknowledged goes, and nobody else reads or leads it astray."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from swanlab_ray.actors.journal.files import Disk
from swanlab_ray.actors.journal.framing import frame
from swanlab_ray.actors.journal.records import Batch, Ended, pack
from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.actors.wire.messages import NumberedBatch
from swanlab_ray.observer.transport import spool as spool_module
from swanlab_ray.observer.transport.spool import Spool
from tests.incarnations import settings_for

DATA = b"x" * 1000


def put(spool: Spool, *numbers: int) -> None:
    for number in numbers:
        spool.put(NumberedBatch(number, 1, DATA))


def read(spool: Spool, count: int) -> list[int]:
    return [spool.read().seq for _ in range(count)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of nine batches, thirty in all at the most."""
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 10_000)
    monkeypatch.setattr(spool_module, "SPOOL_BYTES", 31_000)


@pytest.mark.usefixtures("small")
def test_a_rank_that_stays_behind_for_long_never_runs_out_of_room(tmp_path: Path) -> None:
    """Never more than two batches wait, though thousands go through; the disk holds two files at the most."""
    spool = Spool(settings_for(tmp_path), "r", 0, "life")
    put(spool, 0)
    for number in range(1, 2000):
        put(spool, number)
        assert read(spool, 1) == [number - 1]
        spool.acknowledged(number)
        assert len(list(tmp_path.rglob("spool-*.log"))) <= 2
    assert (spool.first, spool.unread) == (1999, 1)
    spool.acknowledged(2000)
    assert not list(tmp_path.rglob("spool-*.log"))


@pytest.mark.usefixtures("small")
def test_beyond_the_bound_there_is_no_room_until_something_was_acknowledged(tmp_path: Path) -> None:
    spool = Spool(settings_for(tmp_path), "r", 0, "life")
    with pytest.raises(OSError, match="31000 are the most"):
        put(spool, *range(100))
    waiting = spool.unread
    assert 20 <= waiting <= 30
    assert read(spool, 12) == list(range(12))
    spool.acknowledged(12)
    put(spool, waiting)
    assert read(spool, waiting - 11) == list(range(12, waiting + 1))


@pytest.mark.usefixtures("small")
def test_of_many_files_only_the_latest_is_open(tmp_path: Path) -> None:
    """A rank that is cut off for days does not run out of descriptors, and what is in the others is on the disk."""

    class Counting(Disk):
        open, synced = 0, 0

        def create(self, path: Path) -> int:
            self.open += 1
            return super().create(path)

        def sync(self, descriptor: int) -> None:
            self.synced += 1
            super().sync(descriptor)

        def close(self, descriptor: int) -> None:
            self.open -= 1
            super().close(descriptor)

    disk = Counting()
    spool = Spool(settings_for(tmp_path), "r", 0, "life", disk)
    put(spool, *range(25))
    files = len(list(tmp_path.rglob("spool-*.log")))
    assert (files, disk.open) == (3, 1)
    assert disk.synced == files + files - 1  # each header, and each file that is followed by another
    spool.close()
    spool.close(Ended(rank=0, life="life", state="success", ended_ns=0))
    assert disk.open == 0
    assert disk.synced == 2 * files


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("harm", ["another batch", "another record", "damage", "nothing"])
def test_a_place_that_holds_something_else_is_an_error_and_can_be_given_up(tmp_path: Path, harm: str) -> None:
    spool = Spool(settings_for(tmp_path), "r", 0, "life")
    put(spool, 0, 1)
    assert spool.path is not None
    content = spool.path.read_bytes()
    places = spool._segments[0].places
    size = places[0].end - places[0].offset
    other = {
        "another batch": frame(pack(Batch(0, "life", 7, 0, 1, DATA)), places[0].offset),
        "another record": frame(pack(Ended(rank=0, life="life", state="success", ended_ns=0)), places[0].offset),
        "damage": bytes(size),
        "nothing": b"",
    }[harm]
    spool.path.write_bytes(content[: places[0].offset] + other + content[places[0].offset + len(other) :])
    if harm == "nothing":
        assert spool.read() == NumberedBatch(0, 1, DATA)
        return
    for _ in range(2):
        with pytest.raises(OSError, match=f"it is damaged at {places[0].offset}"):
            spool.read()
    assert (spool.unread, spool.give_up_first(), spool.unread) == (2, (0, 1), 1)
    assert spool.read() == NumberedBatch(1, 1, DATA)
    assert spool.first == 0, "it is not acknowledged all the same"


def test_what_is_in_the_window_as_well_is_not_read_back(tmp_path: Path) -> None:
    spool = Spool(settings_for(tmp_path), "r", 0, "life")
    spool.put(NumberedBatch(0, 3, DATA), held=True)
    spool.put(NumberedBatch(1, 2, DATA))
    assert (spool.first, spool.unread) == (0, 1)
    assert spool.read() == NumberedBatch(1, 2, DATA)
    assert spool.unread == 0


@pytest.mark.usefixtures("small")
def test_what_is_left_of_several_files_is_read_as_one_spool(tmp_path: Path) -> None:
    spool = Spool(settings_for(tmp_path), "r", 3, "life")
    put(spool, *range(25))
    read(spool, 12)
    spool.acknowledged(12)
    spool.close()
    (run,) = find_runs([tmp_path])
    assert len(run.spools) == 2
    # The file of which a part was acknowledged is still there: readers take each batch once.
    assert [entry.seq for entry in merged(run) if isinstance(entry, Batch)] == list(range(9, 25))


def test_only_this_user_reads_what_a_rank_has_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it lies beside the journal or, without a log directory, in a place where everybody may write."""
    public = tmp_path / "tmp"
    public.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(public))
    nowhere = tmp_path / "file"
    nowhere.touch()
    for log_dir in (tmp_path / "log", nowhere / "log"):
        spool = Spool(settings_for(log_dir), "r", 0, "life")
        if log_dir.parent == nowhere:  # as an earlier version has made it
            (public / f"swanlab-ray-spool-{os.getuid()}").mkdir(mode=0o755)
        put(spool, 0)
        assert spool.path is not None
        assert stat.S_IMODE(spool.path.stat().st_mode) == 0o600
    assert spool.path is not None
    assert spool.path.is_relative_to(public / f"swanlab-ray-spool-{os.getuid()}")
    assert stat.S_IMODE((public / f"swanlab-ray-spool-{os.getuid()}").stat().st_mode) == 0o700


@pytest.mark.parametrize("trap", ["link", "somebody else's"])
def test_a_directory_that_somebody_else_has_laid_out_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    theirs, public = tmp_path / "theirs", tmp_path / "tmp"
    theirs.mkdir()
    public.mkdir()
    place = public / f"swanlab-ray-spool-{os.getuid()}"
    if trap == "link":
        place.symlink_to(theirs)
    else:
        place = public / f"swanlab-ray-spool-{os.getuid() + 1}"
        place.mkdir()
        monkeypatch.setattr(os, "getuid", lambda: place.stat().st_uid + 1)
    monkeypatch.setattr(tempfile, "tempdir", str(public))
    (tmp_path / "file").touch()
    spool = Spool(settings_for(tmp_path / "file" / "log"), "r", 0, "life")
    with pytest.raises(PermissionError, match="not this user's own"):
        put(spool, 0)
    assert not list(theirs.iterdir())
    assert not list(place.iterdir())
