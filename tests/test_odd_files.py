"""What lies in a log directory besides a run's journal: a spool alone, newer versions, strangers' files, two runs."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from swanlab_ray.actors.journal import framing
from swanlab_ray.actors.journal.files import run_directory
from swanlab_ray.actors.journal.records import VERSION, Alert, Batch, Closed, Ended, Entry
from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.runs.summary import ledger, summarise
from swanlab_ray.actors.wire.codec import encode_batch
from swanlab_ray.actors.wire.messages import Counts
from swanlab_ray.observer.cli import main
from swanlab_ray.observer.history import archive
from swanlab_ray.observer.transport import channel as channel_module
from swanlab_ray.observer.transport import queue as queue_module
from swanlab_ray.observer.transport import tally as tally_module
from swanlab_ray.observer.transport.queue import SLOT_BYTES
from swanlab_ray.observer.transport.spool import how_to_upload
from tests.conftest import wait_until
from tests.incarnations import Cluster, Link, mortal, rank, settings_for
from tests.journals import write_file
from tests.swanlab_cloud import SwanLabCloud
from tests.test_looking import everything_called, header
from tests.test_reading import arrived

# The threads of a killed writer end.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def invoke(*arguments: object, **env: str) -> Result:
    done = CliRunner().invoke(main, [str(one) for one in arguments], env={"COLUMNS": "200"} | env)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done


def journal(log_dir: Path, run_id: str, entries: list[Entry] | None = None, **more: Any) -> Path:
    path = log_dir / "observer" / run_id / "journal-000001.log"
    write_file(path, header(run_id, **more), everything_called("x") if entries is None else entries)
    return path


def test_a_spool_that_no_writer_took_says_so_and_is_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the rank says at its end is a command that works; until then the run is told from one that arrived."""
    monkeypatch.setattr(channel_module, "UNREACHABLE_S", 0.1)
    cluster = Cluster(settings_for(tmp_path))
    link = Link(cluster)
    link.cut = True
    observer = rank(cluster, link)
    for step in range(5):
        observer.log({"x": step}, step)
    assert not observer.finish()
    directory = tmp_path / "observer" / "r"
    assert f"`swanlab-ray sync {directory}` uploads them; if other ranks had a writer" in caplog.text
    assert "success (only spooled)" in invoke("runs", "--log-dir", tmp_path).stdout
    shown = invoke("show", "--log-dir", tmp_path).stdout
    assert "no writer took this run: its 5 events lie in 1 spool file of its ranks" in shown
    assert f"upload them with: swanlab-ray sync {directory}\n" in shown
    (run,) = json.loads(invoke("runs", "--json", "--log-dir", tmp_path).stdout)
    assert (run["only_spooled"], run["events"]) == (True, 5)
    assert 0 < run["last_ns"] - run["started_ns"] < 60e9
    verified = invoke("verify", directory)
    assert verified.exit_code == 0
    assert "no writer took it: upload it with swanlab-ray sync" in verified.stdout
    with SwanLabCloud() as cloud:
        done = invoke("sync", directory, **cloud.environment())
        assert done.exit_code == 0, done.output
        assert cloud.only().points["x"].keys() == set(range(5))


def test_what_to_do_with_a_spool(tmp_path: Path) -> None:
    spool = tmp_path / "my runs" / "spool-0-a.log"
    assert how_to_upload(spool, met_a_writer=False).startswith(f"`swanlab-ray sync '{spool.parent}'` uploads them; if")
    assert how_to_upload(spool, met_a_writer=True).startswith("copy the files to the run's journal on the writer's")
    write_file(spool.parent / "journal-000001.log", header("r"))
    assert how_to_upload(spool, met_a_writer=True) == f"`swanlab-ray sync '{spool.parent}'` uploads them with the run"


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """A log directory with a run of today, and one that a later version has written."""
    journal(tmp_path, "today")
    journal(tmp_path, "tomorrow", version=VERSION + 1)
    return tmp_path


def test_one_is_no_plural(tmp_path: Path) -> None:
    """Of anything that show, verify and sync count."""
    entries = everything_called("x")
    one = [replace(entry, events=1) if isinstance(entry, Batch) else entry for entry in entries]
    directory = journal(tmp_path, "r", one).parent
    with SwanLabCloud() as cloud:
        commands = (["show", "--log-dir", tmp_path], ["verify", tmp_path], ["sync", directory])
        said = "".join(invoke(*command, **cloud.environment()).stdout for command in commands)
    for counted in ("1 rank\n", "1 event,", "in 1 file of 1 writer,", "1 scalar written", "1 row,", "1 batch,"):
        assert counted in said
    assert not re.search(r"(?<![\d.,:])1 [a-z]+s\b", said), said


def test_late_and_repeated_values_are_shown_where_the_writer_has_counted_them(tmp_path: Path) -> None:
    """One of an earlier version has not."""
    closed = Closed(written=1, thinned=0, withheld=0, complete=True)
    journal(tmp_path, "today", [closed.model_copy(update={"late": 2, "repeated": 3})])
    shown = invoke("show", "today", "--log-dir", tmp_path).stdout
    assert "  late: 2 values that came after" in shown
    assert "  repeated: 3 values that their rank had logged before" in shown
    journal(tmp_path, "earlier", [closed])
    shown = invoke("show", "earlier", "--log-dir", tmp_path).stdout
    assert "late:" not in shown
    assert "repeated:" not in shown
    told = json.loads(invoke("show", "earlier", "--json", "--log-dir", tmp_path).stdout)["in_swanlab"]
    assert (told["late"], told["repeated"]) == (None, None)


def test_a_journal_of_a_newer_version_hides_no_other(newer: Path) -> None:
    done = invoke("runs", "--log-dir", newer)
    assert done.exit_code == 1
    assert "today" in done.stdout
    assert done.stderr.startswith("run tomorrow: '/")
    assert f"it is of version {VERSION + 1}, and this program reads up to {VERSION}: update it" in done.stderr
    assert [run["run_id"] for run in json.loads(invoke("runs", "--json", "--log-dir", newer).stdout)] == ["today"]
    assert invoke("show", "today", "--log-dir", newer).exit_code == 0
    refused = invoke("show", "tomorrow", "--log-dir", newer)
    assert refused.exit_code == 1
    assert "update it" in refused.stderr
    verified = invoke("verify", newer)
    assert verified.exit_code == 1
    assert "run today: crashed" in verified.stdout
    assert "run tomorrow: '/" in verified.stdout


def test_files_of_somebody_else_hide_no_run(newer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = journal(newer, "theirs")
    really = Path.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path) == str(theirs):
            raise PermissionError(13, "Permission denied", str(theirs))
        return really(Path(path), *arguments, **options)

    monkeypatch.setattr("swanlab_ray.actors.journal.framing.open", refuse, raising=False)
    done = invoke("runs", "--log-dir", newer)
    assert "today" in done.stdout
    assert f"run theirs: '{theirs}' cannot be read: Permission denied" in done.stderr
    assert f"'{theirs}' cannot be read: Permission denied" in invoke("show", "theirs", "--log-dir", newer).stderr


def test_a_record_that_is_not_understood_costs_no_other(tmp_path: Path) -> None:
    """As one of a later version that kept the format's number: it counts as damage of its place."""
    odd = Alert.model_construct(text=7, time_ns="soon")
    with pytest.warns(UserWarning, match="serialized value"):
        journal(tmp_path, "r", [odd, *everything_called("x")])
    assert "crashed (damaged)" in invoke("runs", "--log-dir", tmp_path).stdout
    assert "x = 1 at step 1" in invoke("show", "--log-dir", tmp_path).stdout
    assert "DAMAGED, a record is not understood" in invoke("verify", tmp_path).stdout


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b"", 1, "it is EMPTY: its writer was killed as it began, or the disk has lost what was in it"),
        (b"\0" * 100, 1, "bytes 0 to 100: cut off"),
        (b"hello\n" * 10_000, 1, "DAMAGED"),
    ],
    ids=["empty", "zeros", "text"],
)
def test_a_journal_without_a_header(tmp_path: Path, content: bytes, code: int, said: str) -> None:
    path = tmp_path / "observer" / "r" / "journal-000001.log"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    done = invoke("verify", tmp_path)
    assert done.exit_code == code
    assert said in done.stdout
    assert done.stdout.endswith("something is damaged or missing\n")
    for command in (["runs"], ["show"], ["show", "r", "--json"]):
        assert invoke(*command, "--log-dir", tmp_path).exit_code == 0


def test_an_empty_file_beside_others_is_told_and_no_loss(tmp_path: Path) -> None:
    """A writer that is killed before its header is on the disk leaves one; it has acknowledged nothing."""
    journal(tmp_path, "r").with_name("journal-000002.log").touch()
    done = invoke("verify", tmp_path)
    assert "it is EMPTY" in done.stdout
    assert done.exit_code == 0


def test_a_damaged_header_costs_the_header_only(tmp_path: Path) -> None:
    path = journal(tmp_path, "r", [*everything_called("x" * 40_000), *everything_called("y")])
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    done = invoke("verify", tmp_path)
    assert done.exit_code == 1
    assert "run r: crashed" in done.stdout
    assert "DAMAGED, the content does not match its checksum" in done.stdout


def test_strays_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    path = journal(tmp_path, "r")
    done = invoke("verify", tmp_path / "notes.txt", path)
    assert done.exit_code == 1
    assert f"{tmp_path / 'notes.txt'}: no header can be read: this is no journal" in done.stdout
    assert "run r: crashed" in done.stdout
    assert invoke("verify", path).exit_code == 0


def test_a_run_is_named_by_its_id_the_beginning_of_it_or_its_directory(tmp_path: Path) -> None:
    """Which of no run and several it is stands in the sentence, and what may be written instead."""
    for number, run_id in enumerate(("lr-1", "lr-2", "other")):
        journal(tmp_path, run_id, time_ns=number + 1)
    for name in ("other", "o", tmp_path / "observer" / "other", f"{tmp_path}/observer/other/"):
        for command in (["show"], ["trace", "-o", tmp_path / "t.json"]):
            done = invoke(*command, name, "--log-dir", tmp_path)
            assert done.exit_code == 0, done.output
            assert "other" in done.stdout
    for name in ("lr", f"{tmp_path}/observer"):
        done = invoke("show", name, "--log-dir", tmp_path)
        assert done.exit_code == 1
        several = "2 runs: lr-1, lr-2" if name == "lr" else "3 runs: lr-1, lr-2, other"
        assert f"'{name}' names {several}; write one of these." in done.stderr
    for name in ("", "nobody", f"{tmp_path}/nowhere"):
        done = invoke("show", name, "--log-dir", tmp_path)
        assert done.exit_code == 1
        assert f"'{name}' names no run in {tmp_path}; there are: lr-1, lr-2, other." in done.stderr


def test_two_runs_of_one_id_in_two_log_directories_are_not_silently_one(tmp_path: Path) -> None:
    """They may be one run that went to another machine, or two; nothing in the files tells, so it is said."""
    for name in ("a", "b"):
        journal(tmp_path / name, "same")
    for arguments in (["verify", tmp_path], ["show", "--log-dir", tmp_path]):
        assert "its journals lie in several directories and count as one run" in invoke(*arguments).stdout
    assert "several directories" not in invoke("verify", tmp_path / "a").stdout


def test_a_spool_whose_journal_is_gone_or_cut_off_is_not_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer had acknowledged what came before; and the rank's own account is in the spool."""
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path))
    link = Link(cluster)
    observer = rank(cluster, link)
    observer.log({"x": 0.0}, 0)
    assert observer.flush(20)
    observer.log({"x": 1.0, "bad": 1j}, 1)
    assert observer.flush(20)
    link.cut = True
    observer.log({"x": 2.0}, 2)
    assert not observer.finish(timeout=1)
    observer.log({"x": 3.0}, 3)
    cluster.kill()
    (journal,) = tmp_path.rglob("journal-*.log")
    journal.unlink()
    run = archive.load_run(cluster.files)
    (account,) = run.accounts
    assert (run.only_spooled, run.untaken) == (True, False)
    assert (account.spooled, account.missing, account.refused) == (1, 2, 1)
    assert (account.logged, account.written, account.dropped) == (3, 0, {})
    shown = "\n".join(archive.describe(run, {}))
    assert "the journal of this run is not here: the other 1 event lies in 1 spool file" in shown


def test_what_a_rank_had_to_drop_stands_in_its_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "QUEUE_BYTES", 50 * SLOT_BYTES)
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path))
    link = Link(cluster)
    link.cut = True
    observer = rank(cluster, link)
    with observer._channel._ownership.lock:  # the flusher stands still meanwhile
        for step in range(200):
            observer.log({"x": float(step)}, step)
    assert not observer.finish(timeout=1)
    (account,) = archive.load_run(cluster.files).accounts
    assert (account.logged, account.spooled) == (200, 50)
    assert account.dropped == {tally_module.OVERFLOW: 150}


def test_what_a_spool_and_the_journal_have_both_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers were lost, so the rank could not know that the writer had it."""
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path))
    link = Link(cluster)
    observer = rank(cluster, link)
    assert observer.wait_ready(20)
    link.lose_answers = 1_000_000
    for step in range(30):
        observer.log({"x": float(step)}, step)
    wait_until(lambda: cluster.find().status().received > 0)
    link.cut = True
    assert not observer.finish(timeout=1)
    assert observer.statistics().spooled == 30
    run = archive.load_run(cluster.files)
    (account,) = run.accounts
    assert account.written > 0
    assert (account.logged, account.written + account.spooled, account.missing) == (30, 30, 0)
    cluster.kill()


@pytest.mark.parametrize("dropped", [{}, {tally_module.OVERFLOW: 5}])
@pytest.mark.parametrize("spool_is_there", [True, False])
def test_so_it_is_where_only_the_rank_s_own_count_tells_of_the_spool(
    tmp_path: Path, spool_is_there: bool, dropped: dict[str, int]
) -> None:
    """A disk that was full: of 20 events 10 were acknowledged and 10 put aside; the journal has 15. Also a writer that
    recovers says so."""
    directory = run_directory(tmp_path, "r")
    life = "a" * 16
    lost = sum(dropped.values())
    counts = Counts(logged=20 + lost, spooled=10, dropped=dropped)
    ended = Ended(rank=0, life=life, state="success", ended_ns=2, counts=counts)
    batches = [Batch(0, life, seq, 1, 5, encode_batch([])) for seq in range(4)]
    closed = Closed(written=1, thinned=0, withheld=0, complete=True)
    entries: list[Entry] = [arrived(life=life, world_size=1), *batches[:3], ended, closed]
    write_file(directory / "journal-000001.log", header("r"), entries)
    if spool_is_there:
        write_file(directory / f"spool-0-{life}-0000.log", header("r", "spool", epoch=0), [*batches[2:], ended])
    (run,) = find_runs([tmp_path])
    (account,) = archive.load_run(run).accounts
    assert (account.logged, account.written, account.spooled) == (20 + lost, 15, 5)
    assert (account.missing, account.dropped) == (0, dropped)
    verified = invoke("verify", tmp_path)
    assert verified.exit_code == 0
    assert ("rank 0 has 5 events on a disk of its own: copy" in verified.stdout) == (not spool_is_there)
    said = "everything is there" if spool_is_there else "what is there is whole, but it may not be all: see above"
    assert verified.stdout.splitlines()[-1] == said
    recovered = ledger(summarise(run.journals).ranks()[0])
    assert (recovered.received, recovered.counts.logged, recovered.counts.spooled) == (15, 20 + lost, 5)


def test_files_that_are_not_there_are_told_as_a_range(tmp_path: Path) -> None:
    directory = run_directory(tmp_path, "r")
    for epoch in (1, 3, 10**12):
        write_file(directory / f"journal-{epoch:06d}.log", header("r", epoch=epoch))
    (run,) = find_runs([tmp_path])
    assert archive.missing_files(run) == [
        "journal-000002.log",
        "journal-000004.log to journal-999999999999.log",
    ]


def test_a_log_directory_of_thousands_of_files_is_looked_through_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A year of runs on a shared disk: of each file its beginning is read, once, however large it is."""
    for run in range(300):
        directory = run_directory(tmp_path, f"run-{run}")
        directory.mkdir(parents=True)
        for epoch in range(1, 9):
            path = directory / f"journal-{epoch:06d}.log"
            write_file(path, header(f"run-{run}", epoch=epoch, time_ns=run + 1))
            os.truncate(path, 1 << 20)
        for number in range(2):
            path = directory / f"spool-{number}-life.log"
            write_file(path, header(f"run-{run}", "spool", epoch=number, time_ns=run + 1))

    class Counted(io.FileIO):
        taken = 0

        def read(self, size: int | None = -1, /) -> bytes:
            content = super().read(-1 if size is None else size) or b""
            self.taken += len(content)
            return content

    opened: list[Counted] = []

    def counted(path: Path, mode: str, buffering: int) -> Counted:
        opened.append(Counted(path, mode))
        return opened[-1]

    monkeypatch.setattr(framing, "open", counted, raising=False)
    runs = find_runs([tmp_path])
    assert [run.run_id for run in runs] == [f"run-{run}" for run in range(300)]
    assert {(len(run.journals), len(run.spools)) for run in runs} == {(8, 2)}
    assert len(opened) == 3000
    assert max(file.taken for file in opened) <= framing.BLOCK
