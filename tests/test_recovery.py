"""What a writer makes of the journal it finds, and a rank of a writer that was restarted: each a mishap that once cost
data or told an untruth."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from swanlab_ray.actors.completions.tables import Table
from swanlab_ray.actors.journal import writing as journal_module
from swanlab_ray.actors.journal.files import Disk, journal_files
from swanlab_ray.actors.journal.reading import Damaged, entries
from swanlab_ray.actors.journal.records import Arrived, Batch, Ended, Finished, Returned, Tick
from swanlab_ray.actors.journal.seen import Numbers
from swanlab_ray.actors.membership import on_disk
from swanlab_ray.actors.reduction.reduction import Reduction
from swanlab_ray.actors.runs.summary import summarise
from swanlab_ray.actors.wire.codec import encode_batch
from swanlab_ray.actors.wire.events import SCALARS, USER
from swanlab_ray.actors.wire.messages import Counts, Goodbye, NumberedBatch
from swanlab_ray.actors.writer.parts import Parts
from swanlab_ray.observer.cli import main
from swanlab_ray.observer.encoding.numbers import Deferred, encode
from swanlab_ray.observer.history import archive
from swanlab_ray.observer.transport import batches as batches_module
from swanlab_ray.observer.transport import channel as channel_module
from swanlab_ray.observer.transport import flusher as flusher_module
from swanlab_ray.observer.transport import tally as tally_module
from swanlab_ray.observer.transport.link import LinkBroken, RunOver
from swanlab_ray.observer.transport.spool import Spool
from tests.conftest import SLOWNESS, wait_until
from tests.incarnations import Cluster, Link, MortalDisk, logged_in, mortal, rank, settings_for

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def _mortal(monkeypatch: pytest.MonkeyPatch) -> None:
    mortal(monkeypatch)
    monkeypatch.setattr(flusher_module, "RETRY_S", (0.01, 0.05))
    monkeypatch.setattr(journal_module, "RETRY_S", 0.01)


def steps_of(cluster: Cluster) -> list[int]:
    return [step for _, step, _ in logged_in(cluster.files)]


def test_a_spool_is_sent_after_a_reconnection_with_nothing_else_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "UNSENT_BYTES", 1_000)
    monkeypatch.setattr(batches_module, "EVENTS_PER_BATCH", 10)
    cluster = Cluster(settings_for(tmp_path))
    link = Link(cluster)
    link.cut = True  # from the very beginning
    observer = rank(cluster, link)
    for step in range(500):
        observer.log({"x": step}, step)
    wait_until(lambda: observer.statistics().spooled > 300)
    link.cut = False
    assert observer.finish()
    assert steps_of(cluster) == list(range(500))


@pytest.mark.parametrize(
    ("where", "why"),
    [("open", "the connection was still being opened"), ("acknowledged", "stands still: wait < wait")],
)
def test_a_thread_that_stands_still_costs_no_event(
    where: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen once: a lock that a fork handler had left behind. Whoever finishes puts aside in the flusher's place."""
    monkeypatch.setattr(channel_module, "SLACK_S", 0.4 * SLOWNESS)
    held, reached = threading.Event(), threading.Event()

    class Standing(Link):
        def __getattribute__(self, name: str) -> Any:
            if name == where and not held.is_set():
                reached.set()
                held.wait(60)
            return super().__getattribute__(name)

    cluster = Cluster(settings_for(tmp_path))
    if where == "open":  # somebody else is the writer's first rank
        cluster.find()
    observer = rank(cluster, Standing(cluster))
    for step in range(3000):
        observer.log({"x": step}, step)
    assert reached.wait(10)
    assert not observer.finish(timeout=1.2 * SLOWNESS)  # the disk may be slow
    statistics = observer.statistics()
    assert statistics.logged == 3000 == statistics.acknowledged + statistics.spooled
    assert why in caplog.text
    assert not observer.finish()  # at once, and nothing is told twice
    held.set()  # it goes on after all: nothing is there twice
    assert observer._channel.done.wait(10)
    assert caplog.text.count("did not reach the writer") == 1
    assert steps_of(cluster) == list(range(3000))


def test_a_thread_that_goes_on_while_its_events_are_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "SLACK_S", 0.1)
    monkeypatch.setattr(batches_module, "EVENTS_PER_BATCH", 50)
    held, real = threading.Event(), Spool.put

    class Standing(Link):
        def acknowledged(self, reference: Any, wait: float) -> Any:
            held.wait(60)
            return super().acknowledged(reference, wait)

    def put(self: Spool, *batch: Any) -> None:
        held.set()
        threading.Event().wait(0.01)  # a slow disk: the other thread is at its work meanwhile
        real(self, *batch)

    monkeypatch.setattr(Spool, "put", put)
    cluster = Cluster(settings_for(tmp_path))
    observer = rank(cluster, Standing(cluster))
    for step in range(3000):
        observer.log({"x": step}, step)
    assert not observer.finish(timeout=0.1)
    assert observer._channel.done.wait(10)
    statistics = observer.statistics()
    assert (statistics.logged, statistics.waiting, statistics.dropped) == (3000, 0, {})
    assert steps_of(cluster) == list(range(3000))


def test_a_value_that_is_never_read_holds_up_neither_the_end_nor_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "SLACK_S", 0.1)
    held = threading.Event()

    class OnDeadGpu(Deferred):
        def ready(self) -> bool:
            return held.wait(60)

    observer = rank(cluster := Cluster(settings_for(tmp_path)), Link(cluster))
    observer.log({"x": 0}, 0)
    assert observer.flush(10)
    observer.send(OnDeadGpu([], bytes))
    observer.log({"x": 1}, 1)
    assert not observer.finish(timeout=0.1)
    statistics = observer.statistics()
    assert (statistics.acknowledged, statistics.spooled) == (1, 1)
    assert statistics.dropped == {tally_module.UNREAD: 1}
    held.set()
    assert observer._channel.done.wait(10)
    assert steps_of(cluster) == [0, 1]


def test_a_writer_that_is_restarted_while_the_disk_refuses_reads_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(settings_for(tmp_path))
    observer = rank(cluster, Link(cluster))
    for step in range(5):
        observer.log({"x": step}, step)
    assert observer.flush()
    cluster.kill()
    real = Disk.create

    def refuses(self: Disk, path: Path) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MortalDisk, "create", refuses)
    writer = cluster.find()
    monkeypatch.setattr(MortalDisk, "create", real)
    observer.log({"x": 5}, 5)
    assert observer.finish()
    rows: Any = writer._parts.reducer.sink.rows  # type: ignore[attr-defined]
    assert [step for step, _ in rows] == [0, 1, 2, 3, 4, 5]


def test_a_spool_on_a_disk_that_fails_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the failed write left behind does not make what follows unreadable."""

    class FullOnce(Disk):
        calls = 0

        def write(self, descriptor: int, data: memoryview, offset: int) -> int:
            self.calls += 1
            if self.calls == 3:
                super().write(descriptor, data[: len(data) // 2], offset)
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(descriptor, data, offset)

    spool = Spool(settings_for(tmp_path), "r", 0, "life", FullOnce())
    zero, one, two = (NumberedBatch(seq, 1, text * 50) for seq, text in enumerate((b"zero", b"one", b"two")))
    spool.put(zero)
    with pytest.raises(OSError, match="No space"):
        spool.put(NumberedBatch(1, 1, b"lost" * 50))
    spool.put(one)
    spool.put(two)
    assert [spool.read() for _ in range(3)] == [zero, one, two]


def test_a_spool_that_cannot_be_read_back_is_counted_and_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(batches_module, "UNSENT_BYTES", 1_000)
    monkeypatch.setattr(batches_module, "EVENTS_PER_BATCH", 10)
    cluster = Cluster(settings_for(tmp_path))
    link = Link(cluster)
    link.cut = True
    observer = rank(cluster, link)
    for step in range(500):
        observer.log({"x": step}, step)
    wait_until(lambda: observer.statistics().spooled > 300)
    (path,) = tmp_path.rglob("spool-*.log")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    link.cut = False
    assert not observer.finish()
    statistics = observer.statistics()
    assert statistics.dropped == {tally_module.UNREADABLE: 10}
    assert "cannot be read back" in caplog.text
    assert statistics.acknowledged == len(steps_of(cluster)) == 490
    (account,) = archive.load_run(cluster.files).accounts
    assert (account.logged, account.written, account.dropped) == (500, 490, statistics.dropped)


class LosesFarewell(Link):
    """The goodbye arrives, its answer does not, and the run is over when the rank asks again."""

    def open(self, hello: Any) -> Any:
        try:
            return super().open(hello)
        except LinkBroken as error:
            raise (RunOver if "RunEnded" in str(error) else LinkBroken)(str(error)) from error

    def goodbye(self, goodbye: Goodbye, wait: float) -> Any:
        super().goodbye(goodbye, wait)
        writer = self.cluster.find()
        if writer._ending.outcome is not None:
            wait_until(lambda: writer.status().closed)
            self.cluster.kill()
        raise LinkBroken("the answer is lost")


def test_a_lost_answer_to_a_goodbye_does_not_change_the_end(tmp_path: Path) -> None:
    cluster = Cluster(settings_for(tmp_path))
    observers = [rank(cluster, LosesFarewell(cluster) if number else Link(cluster), number, 2) for number in range(2)]
    for observer in observers:
        observer.log({"x": 1}, 1)
        assert observer.flush()
    assert observers[0].finish()
    assert observers[1].finish(timeout=30)
    wait_until(lambda: archive.load_run(cluster.files).state == "success")


def test_a_text_that_is_no_unicode_ends_up_readable(tmp_path: Path) -> None:
    cluster = Cluster(settings_for(tmp_path))
    observer = rank(cluster, Link(cluster))
    observer.log({"x": 1}, 1)
    name = os.fsdecode(b"bad\xff.txt")
    assert observer.finish("crashed", f"cannot read {name}")
    run = archive.load_run(cluster.files)
    assert run.summary.finished is not None
    assert "cannot read bad?.txt" in (run.summary.finished.error or "")


class SameHandle(Link):
    """As under Ray: a call reaches whichever incarnation lives now, without notice of a restart."""

    def _call(self, method: str, *arguments: Any) -> Any:
        self._writer = self.cluster.find()
        return super()._call(method, *arguments)


def test_a_restart_that_no_call_has_noticed(tmp_path: Path) -> None:
    cluster = Cluster(settings_for(tmp_path))
    observer = rank(cluster, SameHandle(cluster))
    for step in range(300):
        observer.log({"x": step}, step)
        if step % 50 == 25:
            assert observer.flush()
            observer.log({"y": step}, step)
            cluster.kill()
    assert observer.finish()
    assert sorted(set(steps_of(cluster))) == list(range(300))
    (account,) = archive.load_run(cluster.files).accounts
    assert account.logged == account.written == 306


def test_a_history_that_cannot_be_read_does_not_keep_the_writer_from_working(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(settings_for(tmp_path))
    observer = rank(cluster, Link(cluster))
    observer.log({"x": 0}, 0)
    assert observer.flush()
    cluster.kill()

    def fails(*arguments: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(on_disk, "summarise", fails)
    writer = cluster.find()
    observer.log({"x": 1}, 1)
    assert observer.finish()
    assert any("cannot be read" in notice for notice in writer.status().notices)
    assert steps_of(cluster) == [0, 1]


def test_rows_that_were_confirmed_are_left_out_only_while_the_journal_is_whole(tmp_path: Path) -> None:
    """Where a record is missing, its entries reduce to other rows, and all of them are sent again."""
    cluster = Cluster(settings_for(tmp_path))
    observer = rank(cluster, Link(cluster))
    for step in range(5):
        observer.log({"x": step}, step)
        assert observer.flush()
    parts = cluster.find()._parts
    for rows in range(4):  # faster than that is noted down, and then no more
        parts.notes.delivered(rows)
    wait_until(lambda: list(summarise(cluster.files.paths).rows.values()) == [3])
    cluster.end()
    assert Parts("r", cluster.settings).recovered.rows == 3
    path = cluster.files.journals[0]
    content = bytearray(path.read_bytes())
    ends = [found[0] for found in entries(path) if not isinstance(found, Damaged) and isinstance(found[1], Batch)]
    content[ends[1] - 1] ^= 1
    path.write_bytes(content)
    assert Parts("r", cluster.settings).recovered.rows == 0


def test_a_file_that_could_not_be_made_durable_does_not_fence_its_maker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = os.fsync, [OSError(errno.EIO, "Input/output error")]

    def fails_once(descriptor: int) -> None:
        if failures:
            raise failures.pop()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fails_once)
    cluster = Cluster(settings_for(tmp_path))
    observer = rank(cluster, Link(cluster))
    observer.log({"x": 0}, 0)
    assert observer.finish()
    assert list(journal_files(tmp_path / "observer" / "r")) == [1]


@pytest.mark.parametrize("harm", ["header", "tail", "file"])
def test_verify_finds_what_is_gone(tmp_path: Path, harm: str) -> None:
    """A damaged header, a cut tail of a run that had ended, a file that is missing: none passes for whole."""
    cluster = Cluster(settings_for(tmp_path))
    observer = rank(cluster, Link(cluster))
    for step in range(5):
        observer.log({"x": step}, step)
        assert observer.flush()
    cluster.kill()
    observer.log({"x": 5}, 5)
    assert observer.finish()
    files = list(journal_files(tmp_path / "observer" / "r").values())
    assert CliRunner().invoke(main, ["verify", str(tmp_path)]).exit_code == 0
    if harm == "header":
        content = bytearray(files[0].read_bytes())
        content[20] ^= 1
        files[0].write_bytes(content)
    elif harm == "tail":
        files[0].write_bytes(files[0].read_bytes()[:-200])
    else:
        files[0].unlink()
    checked = CliRunner().invoke(main, ["verify", str(tmp_path)])
    assert checked.exit_code == 1, checked.output
    assert "DAMAGED" in checked.output or "MISSING" in checked.output


@pytest.mark.parametrize("harm", ["none", "running", "file", "half", "to the end of a record"])
def test_verify_claims_nothing_of_what_the_files_cannot_tell(tmp_path: Path, harm: str) -> None:
    """The last file was removed or cut in half: what is there is whole, as after a kill, and that is all it says."""
    cluster = Cluster(settings_for(tmp_path))
    observer = rank(cluster, Link(cluster))
    for step in range(5):
        observer.log({"x": step}, step)
        assert observer.flush()
    cluster.kill()
    observer.log({"x": 5}, 5)
    assert observer.flush()
    last = cluster.files.journals[-1]
    open_still = CliRunner().invoke(main, ["verify", str(tmp_path)])
    assert observer.finish()
    if harm == "file":
        last.unlink()
    elif harm == "half":
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    elif harm == "to the end of a record":
        ends = [found[0] for found in entries(last) if not isinstance(found, Damaged)]
        last.write_bytes(last.read_bytes()[: ends[1]])
    checked = open_still if harm == "running" else CliRunner().invoke(main, ["verify", str(tmp_path)])
    assert checked.exit_code == 0, checked.output
    assert ("somebody is at work on it" in checked.output) == (harm == "running")
    said = checked.output.splitlines()[-1]
    assert said.startswith("everything is there" if harm == "none" else "what is there is whole, but it may not be all")
    assert ("the files tell of no end: what may" in checked.output) == (harm not in ("none", "running"))


def test_damage_in_the_middle_is_named_with_its_rank_and_steps(tmp_path: Path) -> None:
    cluster = Cluster(settings_for(tmp_path))
    observers = [rank(cluster, Link(cluster), number, 2) for number in range(2)]
    for step in range(10):
        for observer in observers:
            observer.log({"x": step}, step)
            assert observer.flush()
    for observer in observers:
        assert observer.finish()
    (path,) = cluster.files.journals
    content = bytearray(path.read_bytes())
    at = content.index(encode((SCALARS, 4, 0, USER, {}))[:3], content.index(b'"rank":1'))  # rank 0's or 1's step 4
    content[at + 5] ^= 1
    path.write_bytes(content)
    checked = CliRunner().invoke(main, ["verify", str(tmp_path)])
    assert checked.exit_code == 1
    assert "are MISSING, between steps 3 and 5" in checked.output


def test_a_pause_of_the_writer_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On waking it has heard nobody for a while, which says nothing about the ranks."""
    cluster = Cluster(settings_for(tmp_path, rank_timeout=5.0))
    observer = rank(cluster, Link(cluster))
    observer.log({"x": 0}, 0)
    assert observer.flush()
    writer = cluster.find()
    real, pause = time.monotonic, [0.0]
    monkeypatch.setattr("swanlab_ray.actors.writer.actor.time.monotonic", lambda: real() + pause[0])
    pause[0] = 3600.0
    observer.log({"x": 1}, 1)
    assert observer.flush(20)
    assert writer.status().state == "running"
    assert observer.finish()
    assert archive.load_run(cluster.files).state == "success"


class Rows:
    """A reduction and what comes out of it."""

    def __init__(self) -> None:
        self.means: dict[int, list[float]] = {}
        self.reduction = Reduction(self, settings_for(Path()))
        self.seq: dict[str, int] = {}

    def config(self, values: dict[str, Any]) -> None: ...

    def write(self, step: int, time_ns: int, values: dict[str, float], table: Table | None = None) -> None:
        if "ranks/x/mean" in values:
            self.means.setdefault(step, []).append(values["ranks/x/mean"])

    def arrive(self, number: int, life: str) -> None:
        self.reduction.take(
            Arrived(rank=number, world_size=2, life=life, local_rank=0, host="h", pid=1, pid_namespace="n")
        )

    def log(self, number: int, life: str, step: int, value: float) -> None:
        seq = self.seq[life] = self.seq.get(life, -1) + 1
        data = encode_batch([encode((SCALARS, step, 0, USER, {"x": value}))])
        self.reduction.take(Batch(number, life, seq, step * 10**9, 1, data))


def test_ranks_that_come_back_after_the_end_are_reduced_together() -> None:
    rows = Rows()
    for number in range(2):
        rows.arrive(number, f"a{number}")
        rows.log(number, f"a{number}", 0, 1.0)
    for number in range(2):
        rows.reduction.take(Ended(rank=number, life=f"a{number}", state="lost", ended_ns=0))
    rows.reduction.take(Finished(state="crashed"))
    for number in range(2):
        rows.arrive(number, f"a{number}")
    for number in range(2):
        rows.log(number, f"a{number}", 1, 1.0 + 10 * number)
    assert rows.means == {0: [1.0], 1: [6.0]}


def test_a_rank_that_comes_back_after_the_end_waits_for_nobody() -> None:
    """Its peers have finished, and nobody else is expected."""
    rows = Rows()
    for number in range(2):
        rows.arrive(number, f"a{number}")
        rows.log(number, f"a{number}", 0, 1.0)
    rows.reduction.take(Ended(rank=0, life="a0", state="success", ended_ns=0))
    rows.reduction.take(Ended(rank=1, life="a1", state="lost", ended_ns=0))
    rows.reduction.take(Finished(state="crashed"))
    rows.reduction.take(Returned(rank=1, life="a1"))
    assert not rows.reduction.waiting
    for step in range(1, 5):
        rows.log(1, "a1", step, 5.0)
    assert rows.means.keys() >= {1, 2, 3}


def test_a_rank_that_is_restarted_waits_for_the_others() -> None:
    """The old life of rank 1 still counts as running when rank 0 is back."""
    rows = Rows()
    for number in range(2):
        rows.arrive(number, f"a{number}")
    for step in range(5):
        for number in range(2):
            rows.log(number, f"a{number}", step, float(step))
    rows.arrive(0, "b0")
    for step in (3, 4):
        rows.log(0, "b0", step, 10.0)
    rows.arrive(1, "b1")
    for step in (3, 4):
        rows.log(1, "b1", step, 20.0)
    for second in range(130):  # as the writer notes them down while values wait
        rows.reduction.take(Tick(time_ns=(10 + second) * 10**9))
    assert rows.means[3] == [3.0, 15.0]
    assert rows.means[4] == [4.0, 15.0]


def test_a_run_of_which_only_spools_are_left_has_its_true_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster was ever there; the training went well all the same."""
    monkeypatch.setattr(channel_module, "UNREACHABLE_S", 0.1)
    cluster = Cluster(settings_for(tmp_path))
    link = Link(cluster)
    link.cut = True
    observer = rank(cluster, link)
    for step in range(5):
        observer.log({"x": step}, step)
    assert not observer.finish()
    run = archive.load_run(cluster.files)
    assert run.state == "success"
    assert run.only_spooled
    (account,) = run.accounts
    assert (account.logged, account.written, account.spooled, account.state) == (5, 0, 5, "success")


def test_a_spool_beside_the_journal_does_not_undo_the_end(tmp_path: Path) -> None:
    """Rank 1 logs on after its peer has failed and the run is over; the spool tells again that it had arrived."""
    cluster = Cluster(settings_for(tmp_path))
    observers = [rank(cluster, Link(cluster), number, 2) for number in range(2)]
    for observer in observers:
        observer.log({"x": 1}, 0)
        assert observer.flush()
    observers[1].finish("crashed", "ValueError: boom")
    observers[0].finish("aborted", "SIGTERM")
    wait_until(lambda: cluster.find().status().closed)
    (path,) = cluster.files.journals
    found = [entry[1] for entry in entries(path) if not isinstance(entry, Damaged)]
    (arrived,) = (entry for entry in found if isinstance(entry, Arrived) and entry.rank == 0)
    (ended,) = (entry for entry in found if isinstance(entry, Ended) and entry.rank == 0)
    spool = Spool(cluster.settings, "r", 0, arrived.life)
    spool.put(NumberedBatch(9, 1, encode_batch([encode((SCALARS, 1, 1, USER, {"x": 2}))])))
    spool.close(arrived, ended)
    run = archive.load_run(cluster.files)
    assert run.as_json()["error"].endswith("ValueError: boom")
    assert run.as_json()["in_swanlab"]["complete"]


def test_damage_is_not_blamed_on_the_rank(tmp_path: Path) -> None:
    """A rank that was killed without a goodbye: what the files had and have no more is missing, not killed."""
    cluster = Cluster(settings_for(tmp_path))
    observer = rank(cluster, Link(cluster))
    for step in range(9):
        observer.log({"x": step}, step)
        assert observer.flush()
    (path,) = cluster.files.journals
    content = bytearray(path.read_bytes())
    ends = [found[0] for found in entries(path) if not isinstance(found, Damaged) and isinstance(found[1], Batch)]
    content[ends[4] - 1] ^= 1
    path.write_bytes(content)
    (account,) = archive.load_run(cluster.files).accounts
    assert account.dropped == {}
    assert account.missing >= 1
    assert account.logged >= 9
    observer.finish()


def test_numbers() -> None:
    numbers = Numbers()
    assert [numbers.add(n) for n in (0, 1, 5, 5, 3, 4, 0, 2, 9)] == [1, 1, 1, 0, 1, 1, 0, 1, 1]
    assert numbers.missing() == [(6, 8)]
    assert numbers.next == 10
    assert [numbers.missing_from(n) for n in (0, 3, 6, 7, 9, 12)] == [6, 6, 6, 7, 10, 12]
    other = Numbers()
    for number in (6, 8, 11):
        other.add(number)
    numbers.join(other)
    assert numbers.missing() == [(7, 7), (10, 10)]


def test_a_goodbye_counts_what_was_dropped(tmp_path: Path) -> None:
    cluster = Cluster(settings_for(tmp_path))
    writer = cluster.find()
    observer = rank(cluster, Link(cluster))
    observer.log({"x": 0}, 0)
    assert observer.flush()
    writer.goodbye(
        Goodbye(
            rank=0,
            life=observer._life,
            state="success",
            error=None,
            ended_ns=1,
            counts=Counts(logged=11, spooled=3, dropped={"a reason": 7}),
        )
    )
    wait_until(lambda: writer.status().closed)
    (account,) = archive.load_run(cluster.files).accounts
    assert (account.logged, account.written, account.spooled, account.dropped) == (11, 1, 3, {"a reason": 7})
    assert account.missing == 0
    observer.finish(timeout=0.1)
