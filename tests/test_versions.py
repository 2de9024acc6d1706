"""Batches that this version cannot read, as of another version or a damaged memory, beside those that it can."""

from __future__ import annotations

import gzip
import json
import socket
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from swanlab_ray.actors.journal.files import Appender, Disk, run_directory
from swanlab_ray.actors.journal.records import (
    REDUCTION_VERSION,
    Arrived,
    Batch,
    Closed,
    Delivered,
    Ended,
    Entry,
    Header,
    unpack,
)
from swanlab_ray.actors.runs.at_work import STILL_S
from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.runs.summary import summarise
from swanlab_ray.actors.wire.codec import encode_batch
from swanlab_ray.actors.wire.events import COMPLETIONS, SCALARS, SPANS, USER
from swanlab_ray.actors.wire.version import package_version
from swanlab_ray.observer import sync
from swanlab_ray.observer.cli import main
from swanlab_ray.observer.encoding.numbers import encode
from swanlab_ray.observer.history import archive
from swanlab_ray.observer.transport import batches
from tests.conftest import wait_until
from tests.incarnations import Cluster, Link, mortal, rank, settings_for
from tests.journals import write_journal
from tests.swanlab_cloud import SwanLabCloud

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
LIFE = "a" * 16
S = 10**9


def arrived(life: str = LIFE) -> Arrived:
    return Arrived(rank=0, world_size=1, life=life, local_rank=0, host="h", pid=1, pid_namespace="elsewhere")


def batch(seq: int, *events: object, life: str = LIFE) -> Batch:
    return Batch(0, life, seq, time.time_ns(), len(events), encode_batch([encode(event) for event in events]))


def spans(step: int) -> tuple[object, ...]:
    return (SPANS, step * S, step * S, 0, ["forward"], ["main"], [0], [0], [step], [0], [S // 2], [], [])


def run_with_a_batch_of_another_version(log_dir: Path) -> None:
    good = [
        batch(
            2 * step,
            (SCALARS, step, step * S, USER, {"loss": float(step)}),
            (COMPLETIONS, step, step * S, "", "", 0, {"prompt": [f"prompt {step}"]}),
            spans(step),
        )
        for step in range(3)
    ]
    bad = [Batch(0, LIFE, 1, time.time_ns(), 7, b"\xc1 of another version"), batch(3, (77, "a new kind"))]
    ended = Ended(rank=0, life=LIFE, state="success", ended_ns=time.time_ns())
    again = arrived("b" * 16)  # a later life makes the readers look for what it has replaced
    write_journal(log_dir, "r", [arrived(), good[0], bad[0], good[1], bad[1], good[2], ended, again])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show"], "loss = 2 at step 2"),
        (["show", "--completions"], "prompt 2"),
        (["show", "--phases"], "forward"),
        (["show", "--json"], '"loss": {"step": 2'),
    ],
)
def test_every_view_shows_what_is_beside_it(tmp_path: Path, arguments: list[str], said: str) -> None:
    run_with_a_batch_of_another_version(tmp_path)
    shown = CliRunner().invoke(main, [*arguments, "--log-dir", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert said in shown.output


def test_a_timeline_has_the_spans_beside_it(tmp_path: Path) -> None:
    run_with_a_batch_of_another_version(tmp_path)
    path = tmp_path / "trace.json.gz"
    written = CliRunner().invoke(main, ["trace", "-o", str(path), "--log-dir", str(tmp_path)])
    assert written.exit_code == 0, written.output
    with gzip.open(path) as file:
        assert [event["args"]["step"] for event in json.load(file)["traceEvents"] if event["ph"] == "X"] == [0, 1, 2]


def test_verify_decodes_and_says_what_it_cannot_read(tmp_path: Path) -> None:
    run_with_a_batch_of_another_version(tmp_path)
    checked = CliRunner().invoke(main, ["verify", str(tmp_path)])
    assert checked.exit_code == 1
    assert "UNREADABLE: Batch 1 of rank 0 (7 events) cannot be decoded" in checked.output
    assert "UNREADABLE: batch 3 of rank 0: an event of kind int 77" in checked.output
    assert "something is damaged or missing" in checked.output


def test_sync_uploads_what_is_beside_it_and_counts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with_a_batch_of_another_version(tmp_path)
    with SwanLabCloud() as cloud:
        for name, value in cloud.environment().items():
            monkeypatch.setenv(name, value)
        (synced,) = sync(tmp_path)
        assert cloud.only().points["loss"] == {0: 0.0, 1: 1.0, 2: 2.0}
    assert synced.damaged == 1


def test_a_live_writer_says_so_once_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path))
    observer = rank(cluster, Link(cluster))
    observer.log({"x": 0}, 0)
    assert observer.flush()
    writer = cluster.find()
    monkeypatch.setattr(batches, "encode_batch", lambda events: b"\xc1 of another version")
    for step in (1, 2):
        observer.log({"x": step}, step)
        assert observer.flush()
    monkeypatch.undo()
    mortal(monkeypatch)
    observer.log({"x": 3}, 3)
    assert observer.finish()
    assert len([notice for notice in writer.status().notices if "cannot be decoded" in notice]) == 1
    run = archive.load_run(cluster.files)
    assert run.state == "success"
    assert run.summary.closed is not None
    assert (run.summary.closed.written, run.summary.closed.complete) == (2, False)


def test_files_say_who_wrote_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path))
    cluster.find()
    header = cluster.files.header
    assert (header.package, header.reduction_version) == (package_version(), REDUCTION_VERSION)
    old = b'C{"type":"header","kind":"journal","run_id":"r","epoch":1,"host":"h","pid":1,"settings":{},"time_ns":1}'
    entry = unpack(old)
    assert isinstance(entry, Header)
    assert (entry.package, entry.reduction_version) == ("", 0)


def test_rows_that_another_reduction_has_counted_are_not_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have made more rows of the same entries, and the cloud would miss as many."""
    mortal(monkeypatch)
    for version, run_id in ((REDUCTION_VERSION, "same"), (REDUCTION_VERSION + 1, "later"), (0, "unknown")):
        settings = settings_for(tmp_path, run_id=run_id)
        rows = Delivered(rows=5, reduction_version=version)
        _write(tmp_path, run_id, settings.public(), [arrived(), batch(0, (SCALARS, 0, 0, USER, {"x": 1.0})), rows])
        cluster = Cluster(settings)
        assert cluster.find()._parts.notes.rows == (5 if run_id == "same" else 0)
        cluster.kill()


def _write(log_dir: Path, run_id: str, public: dict[str, object], entries: list[Entry], host: str = "h") -> Path:
    from swanlab_ray.actors.journal.records import pack

    directory = run_directory(log_dir, run_id)
    directory.mkdir(parents=True)
    header = Header(kind="journal", run_id=run_id, epoch=1, host=host, pid=7, settings=public)
    file = Appender(directory / "journal-000001.log", header, Disk())
    file.append([pack(entry) for entry in entries])
    file.close()
    return file.path


CLOSED = Closed(written=0, thinned=0, withheld=0, complete=True)


@pytest.mark.parametrize(
    ("host", "age", "closed", "working"),
    [
        ("elsewhere", 20.0, False, True),
        ("elsewhere", STILL_S + 20, False, False),
        ("elsewhere", 20.0, True, False),
        ("elsewhere", -3600.0, False, True),  # its clock is ahead
        (socket.gethostname(), 20.0, False, False),  # whoever is at work here holds the lock
    ],
)
def test_a_writer_on_another_machine_is_known_by_its_last_record(
    tmp_path: Path, host: str, age: float, closed: bool, working: bool
) -> None:
    """A lock of another machine is not seen on every shared disk."""
    moment = time.time_ns() - int(age * 1e9)
    last: list[Entry] = [Batch(0, LIFE, n, moment, 1, bytes(3 << 20)) for n in range(3)]
    last += [CLOSED] if closed else []
    _write(tmp_path, "r", {"project": "p"}, last, host)
    (run,) = find_runs([tmp_path])
    assert run.in_progress == working
    if working:
        assert run.at_work is not None
        assert (run.at_work.host, run.at_work.pid) == ("elsewhere", 7)
        assert age <= (run.at_work.age or age) < age + 150  # on a machine that stands still now and then


def test_without_locks_the_last_record_tells_of_this_machine_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    _write(tmp_path, "r", {"project": "p"}, [batch(0)], socket.gethostname())
    (run,) = find_runs([tmp_path])
    assert run.in_progress


def test_a_writer_that_nobody_writes_to_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mortal(monkeypatch)
    monkeypatch.setattr("swanlab_ray.actors.writer.ticker.ALIVE_TICK_S", 0.1)
    cluster = Cluster(settings_for(tmp_path))
    cluster.find()
    (path,) = cluster.files.journals
    first = summarise([path]).last_ns
    wait_until(lambda: summarise([path]).last_ns > first)
    cluster.kill()
