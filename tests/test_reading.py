"""A run read back from its files: its lives, jobs, ledger and end, and what a file is where its header is gone."""

from __future__ import annotations

import errno
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swanlab_ray.actors.journal import batches
from swanlab_ray.actors.journal.batches import BatchReader
from swanlab_ray.actors.journal.framing import frame
from swanlab_ray.actors.journal.reading import Damaged, Follower, entries
from swanlab_ray.actors.journal.records import (
    Alert,
    Arrived,
    Batch,
    Closed,
    Delivered,
    Ended,
    Entry,
    Finished,
    Header,
    Notified,
    Opened,
    Returned,
    UnknownFormat,
    unpack,
)
from swanlab_ray.actors.journal.writing import Position
from swanlab_ray.actors.runs.account import Account
from swanlab_ray.actors.runs.causes import TERMINATED
from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.actors.runs.summary import Life, Summary, ending, ledger, summarise
from swanlab_ray.actors.wire.codec import encode_batch
from swanlab_ray.actors.wire.events import OUTCOME, SCALARS, USER, Outcome, Scalars
from swanlab_ray.actors.wire.messages import Counts
from swanlab_ray.observer.encoding.numbers import encode
from tests.journals import write_file


def header(kind: Any = "journal", **more: Any) -> Header:
    return Header(
        **{"kind": kind, "run_id": "r", "epoch": 1, "host": "h", "pid": 1, "settings": {}, "time_ns": 1} | more
    )


def arrived(rank: int = 0, life: str = "a", world_size: int = 2, time_ns: int = 10) -> Arrived:
    return Arrived(
        time_ns=time_ns,
        rank=rank,
        world_size=world_size,
        life=life,
        local_rank=rank,
        host="h",
        pid=1,
        pid_namespace="n",
    )


def ended(rank: int, state: Any, error: str | None = None, ended_ns: int = 1, life: str = "a", **counts: Any) -> Ended:
    return Ended(time_ns=20, rank=rank, life=life, state=state, error=error, ended_ns=ended_ns, counts=Counts(**counts))


def batch(seq: int, rank: int = 0, life: str = "a", events: int = 1, received_ns: int = 15, *said: Any) -> Batch:
    data = encode_batch(map(encode, said or [(SCALARS, seq, 1, USER, {"x": 1.0})]))
    return Batch(rank, life, seq, received_ns, events, data)


def summary_of(*taken: Entry) -> Summary:
    summary = Summary()
    for entry in taken:
        summary.take(entry)
    return summary


def test_the_ledger_of_a_rank_adds_up_its_lives() -> None:
    """What is in the journal was logged, and is not put aside as well."""
    lives = [
        Life(events=5, ended=ended(0, "lost", logged=11, spooled=2, dropped={"full": 3, "late": 1}, refused=4)),
        Life(events=7, ended=ended(0, "success", logged=6, spooled=1, dropped={"full": 10}, refused=1)),
        Life(events=2),
    ]
    assert ledger(lives) == Account(
        14,
        Counts(logged=11 + 7 + 2, spooled=2, dropped={"full": 13, "late": 1}, refused=5),
    )
    assert ledger([]) == Account()


def test_each_batch_counts_once_and_what_is_missing_is_named() -> None:
    summary = summary_of(arrived(), *(batch(seq, events=10) for seq in (0, 1, 1, 4, 3, 0)))
    assert summary.events == 40
    assert summary.lives[0, "a"].last_batch == batch(4, events=10)
    assert summary.seen.lives[0, "a"].missing() == [(2, 2)]


def test_a_life_says_how_it_ended_with_its_last_batch() -> None:
    """Ray Train ends a worker without another word."""
    crashed = (OUTCOME, "crashed", "boom", 5)
    assert summary_of(batch(0, 0, "a", 1, 15, crashed)).lives[0, "a"].outcome() == Outcome("crashed", "boom", 5)
    went_on = summary_of(batch(0, 0, "a", 1, 15, crashed), batch(1))
    assert went_on.lives[0, "a"].outcome() is None
    assert summary_of(batch(0, 0, "a", 1, 15, (OUTCOME, None, None, 5))).lives[0, "a"].outcome() is None
    assert summary_of(arrived()).lives[0, "a"].outcome() is None
    assert summary_of(Batch(0, "a", 0, 1, 1, b"no batch")).lives[0, "a"].outcome() is None


def test_a_run_that_is_gone_on_with_has_had_two_jobs() -> None:
    first: list[Entry] = [
        arrived(),
        arrived(1),
        Notified(time_ns=11, key="told"),
        Finished(time_ns=30, state="crashed", error="e"),
    ]
    again = arrived(life="b", world_size=4, time_ns=40)
    summary = summary_of(*first)
    assert (summary.sessions, summary.session_ns, summary.before_ns, summary.world_size) == (1, 10, 0, 2)
    assert (summary.notified, summary.session_lives) == ({"told"}, {"a"})
    summary = summary_of(*first, again, again, arrived(1, "b", 4, 41))
    assert (summary.sessions, summary.session_ns, summary.before_ns, summary.world_size) == (2, 40, 30, 4)
    assert (summary.notified, summary.session_lives, summary.finished) == (set(), {"b"}, None)
    assert [[life.arrived.life for life in lives if life.arrived] for lives in summary.ranks().values()] == [
        ["a", "b"],
        ["a", "b"],
    ]


def test_a_rank_that_returns_undoes_the_end() -> None:
    over: list[Entry] = [
        arrived(),
        ended(0, "lost"),
        Finished(state="crashed"),
        Closed(written=1, thinned=0, withheld=0, complete=True),
    ]
    summary = summary_of(*over)
    assert summary.finished is not None
    assert summary.closed is not None
    back = summary_of(*over, Returned(rank=0, life="a"))
    assert (back.finished, back.closed, back.lives[0, "a"].ended) == (None, None, None)


def test_what_the_cloud_has_confirmed_only_rises_and_by_the_reduction_that_counted_it() -> None:
    confirmed = [Delivered(rows=rows, reduction_version=version) for rows, version in ((5, 1), (9, 2), (7, 2), (0, 3))]
    assert summary_of(*confirmed).rows == {1: 5, 2: 9, 3: 0}


def test_a_run_lasts_from_its_first_entry_to_its_last_whatever_order_they_are_in() -> None:
    summary = summary_of(arrived(time_ns=50), Alert(time_ns=20, text="x"), batch(0, received_ns=90), batch(1))
    assert (summary.first_ns, summary.last_ns) == (15, 90)
    assert (
        len(summary_of(Alert(time_ns=1, text="x"), Alert(time_ns=1, text="x"), Alert(time_ns=2, text="x")).alerts) == 2
    )


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([("success", None, 1), ("success", None, 2)], ("success", None)),
        ([("success", None, 1)], None),  # of two ranks one has not ended
        ([("crashed", "late", 9), ("crashed", "early", 5)], ("crashed", "rank 1: early")),
        ([("success", None, 1), ("aborted", None, 5)], ("aborted", "rank 1: aborted")),
        ([("lost", None, 5), ("success", None, 1)], ("crashed", "rank 0: lost")),
        # Whoever was told to end is not the cause, though it was faster.
        ([("crashed", f"{TERMINATED} from outside", 1), ("crashed", "boom", 5)], ("crashed", "rank 1: boom")),
        (
            [("crashed", f"{TERMINATED} 2", 2), ("crashed", f"{TERMINATED} 1", 1)],
            ("crashed", f"rank 1: {TERMINATED} 1"),
        ),
    ],
)
def test_without_a_writer_s_word_the_first_failure_is_the_cause(ends: list[Any], expected: Any) -> None:
    summary = summary_of(
        arrived(), arrived(1), *(ended(rank, state, error, at) for rank, (state, error, at) in enumerate(ends))
    )
    assert ending(summary) == expected
    assert ending(summary_of(Finished(state="aborted", error="x"))) == ("aborted", "x")


def test_a_rank_that_was_started_again_ended_as_its_latest_life_did() -> None:
    lives: list[Entry] = [
        arrived(world_size=1),
        ended(0, "crashed", "boom"),
        arrived(life="b", world_size=1, time_ns=12),
    ]
    assert ending(summary_of(*lives)) is None
    assert ending(summary_of(*lives, ended(0, "success", life="b"))) == ("success", None)
    assert ending(Summary()) is None


def test_a_reader_of_batches_gets_each_once_and_is_told_of_the_first_that_it_cannot_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batches._tell.cache_clear()
    reader = BatchReader()
    assert reader.events(batch(1)) == [Scalars(1, 1, USER, {"x": 1.0})]
    assert reader.events(batch(1)) == []
    assert reader.events(batch(0)) == [Scalars(0, 1, USER, {"x": 1.0})]
    assert [reader.events(Batch(0, "a", seq, 1, 3, b"no batch")) for seq in (2, 2, 3)] == [[], [], []]
    assert reader.unread == 2
    again = BatchReader()
    assert again.events(Batch(0, "a", 2, 1, 3, b"no batch")) == []
    (told,) = [record.message for record in caplog.records]
    assert told.startswith("Batch 2 of rank 0 (3 events) cannot be decoded and is left out (")
    assert told.endswith("swanlab-ray. Check the run's files with: swanlab-ray verify")


def test_a_follower_goes_on_where_it_was_over_as_many_files_as_there_are(tmp_path: Path) -> None:
    """No entry twice, and nothing beyond what was committed."""
    ends: dict[int, list[int]] = {}
    for epoch in (1, 2, 3):
        path = tmp_path / f"journal-{epoch:06d}.log"
        write_file(path, header(epoch=epoch), [batch(10 * epoch + number) for number in range(3)])
        ends[epoch] = [found[0] for found in entries(path) if not isinstance(found, Damaged)]
    follower = Follower(tmp_path, Position(1, ends[1][1]))  # after the header and one batch

    def read(epoch: int, number: int) -> list[int]:
        seqs = [one.seq for one in follower.read(Position(epoch, ends[epoch][number])) if isinstance(one, Batch)]
        assert follower.position == Position(epoch, ends[epoch][number])
        return seqs

    assert read(1, 2) == [11]
    assert read(1, 2) == []
    assert read(2, 0) == [12]
    assert read(2, 1) == [20]
    assert read(3, 2) == [21, 22, 30, 31]
    assert read(3, 3) == [32]
    assert list(follower.read(Position(2, 0))) == [], "it never goes back"
    assert follower.position == Position(3, ends[3][3])


# Files.


def test_a_file_without_a_readable_header_is_what_its_name_says(tmp_path: Path) -> None:
    """Its run is the directory's, its epoch or rank the number in its name; and the run is told by another file."""
    directory = tmp_path / "observer" / "some-run"
    told = header(run_id="some-run", epoch=2, settings={"project": "p"}, time_ns=7)
    write_file(directory / "journal-000002.log", told)
    for name in ("journal-000001.log", "journal-000012.log", "spool-3-life-0001.log"):
        (directory / name).write_bytes(b"x" * 100)
    for name in ("journal-x.log", "spool-.log", "journal-000001.txt"):
        (directory / name).write_bytes(b"x" * 100)
    for path in directory.iterdir():
        os.utime(path, ns=(8, 8))
    (run,) = find_runs([tmp_path])
    assert [path.name for path in run.journals] == ["journal-000001.log", "journal-000002.log", "journal-000012.log"]
    assert [path.name for path in run.spools] == ["spool-3-life-0001.log"]
    assert (run.run_id, run.header) == ("some-run", told)
    assert not run.ambiguous


def test_what_is_no_journal_is_refused_and_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "journal-000001.log"
    write_file(path, None, [Alert(text="x")])
    with pytest.raises(UnknownFormat, match="is not a journal of swanlab-ray"):
        list(entries(path))
    write_file(path, header(), [Alert(time_ns=5, text="a")])
    first = frame(b'C{"type":"header"}', 0)
    path.write_bytes(first)
    with pytest.raises(UnknownFormat, match=r"cannot be read: a record is not understood: Field required"):
        list(entries(path))
    write_file(path, header(), [Alert(time_ns=5, text="a")])
    size = path.stat().st_size
    odd, unknown = frame(b'C{"type":"alert","text":7}', size), b'C{"type":"of a later version"}'
    content = path.read_bytes() + odd
    content += frame(unknown, len(content))
    path.write_bytes(content + frame(b"?no record", len(content)))
    (_, head), (_, alert), damaged = entries(path)  # type: ignore[misc]
    assert (head, alert) == (header(), Alert(time_ns=5, text="a"))
    assert isinstance(damaged, Damaged)
    assert (damaged.damage.offset, damaged.damage.end, damaged.damage.torn) == (size, size + len(odd), False)
    assert "valid string" in damaged.damage.reason


def test_files_of_a_run_are_counted_with_those_that_are_gone_left_out(tmp_path: Path) -> None:
    write_file(tmp_path / "journal-000001.log", header(), [arrived(), batch(0), batch(2)])
    size = (tmp_path / "journal-000001.log").stat().st_size
    summary = summarise([tmp_path / "journal-000001.log", tmp_path / "spool-0-gone.log"])
    assert (summary.files, summary.size, len(summary.headers)) == (1, size, 1)
    assert (summary.lives[0, "a"].next_seq, summary.lives[0, "a"].missing) == (3, [(1, 1)])


def test_a_place_that_is_not_there_or_not_ours_to_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        find_runs([tmp_path / "nowhere"])
    assert (missing.value.errno, missing.value.filename) == (errno.ENOENT, str(tmp_path / "nowhere"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != (os.R_OK | os.X_OK))
    with pytest.raises(PermissionError) as refused:
        find_runs([tmp_path])
    assert (refused.value.errno, refused.value.filename) == (errno.EACCES, str(tmp_path))
    write_file(tmp_path / "journal-000001.log", header())
    assert len(find_runs([tmp_path / "journal-000001.log"])) == 1


def test_records_of_the_first_version_are_read(tmp_path: Path) -> None:
    """As they were written before fields were added; what they do not say is said here."""
    first = {
        b'{"type":"arrived","time_ns":1,"rank":3,"world_size":4,"life":"a","local_rank":1,"host":"h","pid":5,'
        b'"pid_namespace":"n"}': Arrived(
            time_ns=1,
            rank=3,
            world_size=4,
            life="a",
            local_rank=1,
            host="h",
            pid=5,
            pid_namespace="n",
            gpu=None,
            restarts=0,
            attempt=0,
            nonce="",
            version="",
        ),
        b'{"type":"ended","time_ns":1,"rank":0,"life":"a","state":"lost","ended_ns":2}': Ended(
            time_ns=1,
            rank=0,
            life="a",
            state="lost",
            error=None,
            ended_ns=2,
            counts=Counts(logged=0, spooled=0, dropped={}, refused=0),
        ),
        b'{"type":"header","time_ns":1,"format":"swanlab-ray","version":1,"kind":"journal","run_id":"r","epoch":1,'
        b'"host":"h","pid":1,"settings":{}}': header(package="", reduction_version=0),
        b'{"type":"closed","time_ns":1,"written":1,"thinned":2,"withheld":3,"complete":true}': Closed(
            time_ns=1,
            written=1,
            thinned=2,
            withheld=3,
            complete=True,
            completions=0,
            completions_dropped=0,
            late=None,
            repeated=None,
        ),
        b'{"type":"delivered","time_ns":1,"rows":5}': Delivered(time_ns=1, rows=5, reduction_version=0),
        b'{"type":"opened","time_ns":1,"mode":"offline"}': Opened(time_ns=1, mode="offline", run_dir=None, url=None),
        b'{"type":"finished","time_ns":1,"state":"success"}': Finished(time_ns=1, state="success", error=None),
    }
    for text, entry in first.items():
        assert unpack(b"C" + text) == entry


def test_reading_a_large_journal_takes_little_memory(tmp_path: Path) -> None:
    """Of 24 MB never more than a few batches are held, whoever reads, and however late a damaged one is."""
    path = tmp_path / "journal-000001.log"
    large = bytes(range(256)) * 4096
    write_file(path, header(), [arrived(), *(Batch(0, "a", seq, 15, 1, large) for seq in range(24))])
    with open(path, "r+b") as file:
        file.seek(20 << 20)
        file.write(b"x" * 100)
    (run,) = find_runs([path])
    readers: list[Callable[[], int]] = [
        lambda: summarise([path]).lives[0, "a"].next_seq,
        lambda: max(entry.seq for entry in merged(run) if isinstance(entry, Batch)) + 1,
        lambda: sum(isinstance(found, Damaged) for found in entries(path)) + 23,
    ]
    for read in readers:
        tracemalloc.start()
        try:
            assert read() == 24
            assert tracemalloc.get_traced_memory()[1] < 12 << 20
        finally:
            tracemalloc.stop()
