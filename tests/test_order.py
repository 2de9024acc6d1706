"""Each batch once, and in the order of its life, whatever holes, spools and clocks have made of the files."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from swanlab_ray.actors.journal.files import Appender, Disk, run_directory
from swanlab_ray.actors.journal.records import Arrived, Batch, Ended, Entry, Finished, Header, pack
from swanlab_ray.actors.journal.seen import InOrder, Numbers
from swanlab_ray.actors.membership import on_disk
from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.actors.runs.summary import Summary, summarise
from swanlab_ray.actors.wire.codec import encode_batch
from swanlab_ray.actors.wire.events import SCALARS, USER
from swanlab_ray.actors.wire.messages import WINDOW, Counts, Hello, NumberedBatch, Sign
from swanlab_ray.observer.encoding.numbers import encode
from swanlab_ray.observer.history import archive
from tests.incarnations import Cluster, MortalDisk, mortal, settings_for

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
LIFE = "a" * 16
HOUR = 3600 * 10**9
EVENTS = 20
"""In a batch."""


def arrived(rank: int = 0, life: str = LIFE, moment: int = 1) -> Arrived:
    return Arrived(
        time_ns=moment,
        rank=rank,
        world_size=1,
        life=life,
        local_rank=0,
        host="h",
        pid=1,
        pid_namespace="elsewhere",
    )


def hello(next_seq: int, rank: int = 0, life: str = LIFE) -> Hello:
    return Hello(
        rank=rank,
        world_size=1,
        local_rank=0,
        host="h",
        pid=1,
        pid_namespace="elsewhere",
        gpu=None,
        life=life,
        next_seq=next_seq,
    )


def batch(seq: int, moment: int = 0, life: str = LIFE) -> Batch:
    """Larger than a block of the file, as a hole has to be; its steps go up with its number."""
    values = [{f"{k}": random.random() for k in range(300)} for _ in range(EVENTS)]
    events = [encode((SCALARS, seq * EVENTS + n, 0, USER, one)) for n, one in enumerate(values)]
    return Batch(0, life, seq, moment or time.time_ns(), EVENTS, encode_batch(events))


def write(path: Path, entries: list[Entry], **header: Any) -> list[int]:
    """A file of these entries; the offsets after each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {"kind": "journal", "run_id": "r", "epoch": 1, "host": "h", "pid": 1, "settings": {}}
    file = Appender(path, Header(**(values | header)), Disk())
    ends = file.append([pack(entry) for entry in entries])
    file.close()
    return ends


def write_with_hole(log_dir: Path, batches: list[Batch], hole: slice) -> None:
    """A journal whose machine lost its power before some pages of the last write were on disk."""
    path = run_directory(log_dir, "r") / "journal-000001.log"
    ends = write(path, [arrived(), *batches])
    with open(path, "r+b") as file:
        file.seek(ends[hole.start])
        file.write(bytes(ends[hole.stop] - ends[hole.start]))


def merged_seqs(log_dir: Path) -> list[int]:
    (run,) = find_runs([log_dir])
    return [entry.seq for entry in merged(run) if isinstance(entry, Batch)]


def test_a_rank_forgets_only_what_is_there_without_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches 1 to 3 were not acknowledged and cannot be read; 4 lies behind the hole."""
    mortal(monkeypatch)
    batches = [batch(seq) for seq in range(5)]
    write_with_hole(tmp_path, batches, slice(1, 3))
    cluster = Cluster(settings_for(tmp_path))
    writer = cluster.find()
    ack = writer.hello(hello(next_seq=1))
    assert (ack.durable, ack.next_seq) == (1, 1)
    assert writer.status().received == 2 * EVENTS
    for one in batches[1:]:
        ack = writer.ingest(Sign(0, LIFE, Counts()), NumberedBatch(one.seq, one.events, one.data))
        assert ack.next_seq == one.seq + 1
    assert writer._journal.settled(10)
    assert writer.status().received == 5 * EVENTS  # each once, though 4 is there twice
    cluster.kill()
    assert merged_seqs(tmp_path) == [0, 1, 2, 3, 4]
    (account,) = archive.load_run(cluster.files).accounts
    assert (account.written, account.missing) == (5 * EVENTS, 0)
    rows: Any = writer._parts.reducer.sink.rows  # type: ignore[attr-defined]
    assert [step for step, _ in rows] == sorted(step for step, _ in rows)


def test_what_was_acknowledged_and_is_gone_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank has forgotten it: it can send from 4 on, and that is there."""
    mortal(monkeypatch)
    write_with_hole(tmp_path, [batch(seq) for seq in range(5)], slice(1, 3))
    cluster = Cluster(settings_for(tmp_path))
    writer = cluster.find()
    ack = writer.hello(hello(next_seq=4))
    assert (ack.durable, ack.next_seq) == (5, 5)
    assert not [notice for notice in writer.status().notices if "another machine" in notice]
    cluster.kill()


def test_what_its_dead_writer_had_not_synced_is_synced_before_a_rank_forgets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be in this machine's memory only; and where it cannot be synced, all is sent again."""
    mortal(monkeypatch)
    write(run_directory(tmp_path, "r") / "journal-000001.log", [arrived(), *(batch(seq) for seq in range(3))])
    synced: list[str] = []

    def syncs(self: Disk, path: Path) -> None:
        synced.append(path.name)

    monkeypatch.setattr(MortalDisk, "make_durable", syncs)
    cluster = Cluster(settings_for(tmp_path))
    assert cluster.find().hello(hello(next_seq=1)).durable == 3
    assert synced == ["journal-000001.log"]
    cluster.kill()

    def fails(self: Disk, path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(MortalDisk, "make_durable", fails)
    assert cluster.find().hello(hello(next_seq=1)).durable == 1
    cluster.kill()


def test_what_an_earlier_writer_wrote_on_is_read_once_for_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was cut off and did not know; the ranks come with what it had acknowledged."""
    mortal(monkeypatch)
    path = run_directory(tmp_path, "r") / "journal-000001.log"
    write(path, [arrived(rank) for rank in range(4)])
    cluster = Cluster(settings_for(tmp_path))
    writer = cluster.find()
    late = [Batch(rank, LIFE, 0, time.time_ns(), 1, encode_batch([])) for rank in range(4)]
    path.unlink()
    write(path, [*(arrived(rank) for rank in range(4)), *late])
    readings: list[int] = []

    def counted(paths: list[Path]) -> Summary:
        readings.append(len(paths))
        return summarise(paths)

    monkeypatch.setattr(on_disk, "summarise", counted)
    for rank in range(4):
        assert writer.hello(hello(1, rank)).durable == 1
    assert readings == [1]
    assert not [notice for notice in writer.status().notices if "another machine" in notice]
    cluster.kill()


@given(history=st.lists(st.tuples(st.integers(0, WINDOW), st.sets(st.integers(0, WINDOW - 1))), max_size=8))
@example(history=[(0, {3})])
@settings(deadline=None, max_examples=200, print_blob=True)
def test_batches_are_taken_once_and_in_order_after_any_loss(history: list[tuple[int, set[int]]]) -> None:
    """Each incarnation acknowledges some of a window, and of the others any may be on its disk when the power fails."""
    order: InOrder[int] = InOrder()
    taken: list[int] = []
    there = Numbers()
    acknowledged = 0
    for count, survivors in [*history, (WINDOW, set())]:
        due = there.missing_from(acknowledged)
        window = range(due, acknowledged + WINDOW)
        acknowledged = max(acknowledged, min(due + count, acknowledged + WINDOW))
        for place, seq in enumerate(window):
            if seq < acknowledged or place in survivors:
                there.add(seq)
                taken += order.take(Batch(0, LIFE, seq, 0, 1, b""), seq)
    assert taken == list(range(acknowledged))


def test_a_gap_that_nothing_fills_holds_up_no_more_than_a_window() -> None:
    order: InOrder[int] = InOrder()
    taken = [order.take(Batch(0, LIFE, seq, 0, 1, b""), seq) for seq in (0, 5, 6, 7)]
    assert taken == [[0], [5], [6], [7]]  # 1 is too far below 5 to come again
    taken = [order.take(Batch(0, LIFE, seq, 0, 1, b""), seq) for seq in (9, 10, 11, 12, 8)]
    assert taken == [[], [], [], [9, 10, 11, 12], [8]]


@pytest.mark.parametrize(
    "last",
    [
        Ended(rank=0, life=LIFE, state="lost", ended_ns=0),
        arrived(life="b" * 16),
        Finished(state="crashed"),
    ],
)
def test_what_is_held_is_taken_when_its_life_is_over(last: Entry) -> None:
    order: InOrder[Entry] = InOrder()
    held = Batch(0, LIFE, 2, 0, 1, b"")
    assert order.take(held, held) == []
    assert order.take(last, last) == [held, last]


def test_what_is_held_of_a_life_waits_on_when_another_one_is_over() -> None:
    """Another rank's, or another life's; and a hello that is told once more ends nothing."""
    order: InOrder[Entry] = InOrder()
    held = [Batch(rank, life, 2, 0, 1, b"") for rank in range(2) for life in (LIFE, "b" * 16)]
    for one in held:
        assert order.take(one, one) == []
    mine, other_life, other_rank, other = held
    ended = Ended(rank=0, life=LIFE, state="lost", ended_ns=0)
    assert order.take(ended, ended) == [mine, ended]
    again = arrived(life="b" * 16)
    assert order.take(again, again) == [again]
    new = arrived(rank=1, life="c" * 16)
    assert order.take(new, new) == [other_rank, other, new]
    assert order.rest() == [other_life]
    assert order.rest() == []


times = st.sampled_from([-2 * HOUR, -60 * 10**9, 0, 60 * 10**9, 2 * HOUR])


@given(
    skew=times,
    set_back=times,
    where=st.lists(st.sampled_from("jjs"), min_size=1, max_size=12),
    cut=st.integers(0, 12),
    twice=st.sets(st.integers(0, 11)),
)
@example(skew=-2 * HOUR, set_back=0, where=["j"] * 6, cut=0, twice={5})
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150, print_blob=True)
def test_a_spool_and_the_journal_are_one_sequence_whatever_their_clocks_say(
    tmp_path_factory: pytest.TempPathFactory, skew: int, set_back: int, where: list[str], cut: int, twice: set[int]
) -> None:
    """The rank's clock is ahead or behind; the second writer's is set back or forward; some batches are in both."""
    log_dir = tmp_path_factory.mktemp("run")
    directory = run_directory(log_dir, "r")
    begin = 100 * HOUR
    journals: list[list[Entry]] = [[arrived(moment=begin)], []]
    spool: list[Entry] = []
    for seq, place in enumerate(where):
        moment = begin + (seq + 1) * 10**9
        second = seq >= cut
        if place == "j" or seq in twice:
            journals[second].append(Batch(0, LIFE, seq, moment + set_back * second, 1, b""))
        if place == "s" or seq in twice:
            spool.append(Batch(0, LIFE, seq, moment + skew, 1, b""))
    journals[1] += [arrived(life="b" * 16, moment=begin + 20 * 10**9 + set_back), Batch(0, "b" * 16, 0, 1, 1, b"")]
    for epoch, found in enumerate(journals, 1):
        write(directory / f"journal-{epoch:06d}.log", found, epoch=epoch)
    write(directory / f"spool-0-{LIFE}.log", spool, kind="spool")
    (run,) = find_runs([log_dir])
    seqs = [(entry.life, entry.seq) for entry in merged(run) if isinstance(entry, Batch)]
    assert seqs == [(LIFE, seq) for seq in range(len(where))] + [("b" * 16, 0)]
    assert [life.arrived.life for life in summarise(run.paths).ranks()[0] if life.arrived] == [LIFE, "b" * 16]


def test_a_spool_that_is_removed_while_it_is_read_is_passed_over(tmp_path: Path) -> None:
    """The writer has it all by then."""
    directory = run_directory(tmp_path, "r")
    write(directory / "journal-000001.log", [arrived(), Batch(0, LIFE, 0, 2, 1, b"")])
    write(directory / "spool-0-x.log", [Batch(0, LIFE, 0, 2, 1, b"")], kind="spool")
    (run,) = find_runs([tmp_path])
    run.spools[0].unlink()
    assert [entry.seq for entry in merged(run) if isinstance(entry, Batch)] == [0]
    assert summarise(run.paths).events == 1
