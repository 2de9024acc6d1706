"""The writer by itself: its class without Ray, writing real SwanLab runs."""

from __future__ import annotations

import itertools
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from swanlab_ray.actors.health.stragglers import Straggler
from swanlab_ray.actors.journal.files import journal_files
from swanlab_ray.actors.journal.reading import Damaged, entries
from swanlab_ray.actors.journal.records import Tick
from swanlab_ray.actors.membership import newcomers as newcomers_module
from swanlab_ray.actors.runs.summary import KILLED
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.codec import encode_batch
from swanlab_ray.actors.wire.events import RANK, SCALARS, USER, Outcome, Progress, State
from swanlab_ray.actors.wire.locks import pid_namespace
from swanlab_ray.actors.wire.messages import (
    Ack,
    Counts,
    Doing,
    Farewell,
    Goodbye,
    Hello,
    NumberedBatch,
    RunEnded,
    Sign,
    UnknownRank,
)
from swanlab_ray.actors.writer import ending, ticker
from swanlab_ray.actors.writer.actor import Writer
from swanlab_ray.observer.encoding.numbers import encode
from swanlab_ray.observer.history import archive
from tests.conftest import wait_until
from tests.swanlab_file import RunFile, only_run

_runs = itertools.count()
NOTHING = Counts()


class Run:
    """A writer and ranks that talk to it."""

    def __init__(self, log_dir: Path, world_size: int, **settings: Any) -> None:
        values = {"project": "p", "mode": "offline", "log_dir": log_dir, "rank_timeout": 1.0} | settings
        self.log_dir = log_dir
        self.world_size = world_size
        self.seq = [0] * 16
        self.writer = Writer(f"run{next(_runs)}", ObserverSettings(**values))

    def hello(
        self, rank: int, life: str = "a", next_seq: int = 0, pid: int = 0, world_size: int = 0, restarts: int = 0
    ) -> Any:
        return self.writer.hello(
            Hello(
                rank=rank,
                world_size=world_size or self.world_size,
                local_rank=rank,
                host=f"host{rank}",
                pid=pid or os.getpid(),
                pid_namespace=pid_namespace() if pid else "elsewhere",
                gpu=None,
                life=life,
                next_seq=next_seq,
                restarts=restarts,
            )
        )

    def send(self, rank: int, *events: Any, life: str = "a", seq: int | None = None) -> Any:
        seq = self.seq[rank] if seq is None else seq
        batch = encode_batch([encode(event) for event in events])
        ack = self.sign(rank, life=life, batch=NumberedBatch(seq, len(events), batch))
        self.seq[rank] = ack.next_seq
        assert self.writer._journal.settled(10)
        assert self.writer._parts.decoding.settled(10)
        return ack

    def sign(self, rank: int, counted: Counts = NOTHING, life: str = "a", batch: NumberedBatch | None = None) -> Ack:
        ack: Ack = self.writer.ingest(Sign(rank, life, counted), batch)
        return ack

    def log(self, rank: int, step: int, life: str = "a", **values: Any) -> Any:
        return self.send(rank, (SCALARS, step, time.time_ns(), USER, values), life=life)

    def goodbye(
        self, rank: int, state: State = "success", error: str | None = None, time_ns: int = 0, life: str = "a"
    ) -> Farewell:
        farewell: Farewell = self.writer.goodbye(
            Goodbye(rank=rank, life=life, state=state, error=error, ended_ns=time_ns, counts=NOTHING)
        )
        return farewell

    def ended(self) -> RunFile:
        wait_until(lambda: self.writer.status().closed)
        return only_run(self.log_dir)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """These writers are no actors: they have nothing to end."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(ticker, "LINGER_S", 0.0)


def test_success_only_if_every_rank_finished(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    run.hello(0)
    run.hello(1)
    assert not run.goodbye(0).last
    assert run.goodbye(1).last
    assert run.ended().state == "finished"


def test_the_first_failure_is_the_cause(tmp_path: Path) -> None:
    """Rank 0 reports first, but rank 1 fell first."""
    run = Run(tmp_path, 2)
    run.hello(0)
    run.hello(1)
    run.goodbye(0, "crashed", "connection closed by peer", time_ns=20)
    run.goodbye(1, "crashed", "ValueError: boom", time_ns=10)
    ended = run.ended()
    assert ended.state == "crashed"
    assert ended.error.startswith("rank 1 (host1, pid")
    assert ended.error.endswith("ValueError: boom")


def test_a_rank_that_is_done_before_its_peer_is_started_again(tmp_path: Path) -> None:
    """The launcher starts both again after a failure; until rank 1 is there, its failure is not the end."""
    run = Run(tmp_path, 2, rank_timeout=60.0)
    for rank in (0, 1):
        run.hello(rank, restarts=1)
    run.goodbye(1, "crashed", "ValueError: boom", time_ns=10)
    run.goodbye(0, "aborted", "SIGTERM", time_ns=20)
    run.hello(0, life="b", restarts=1)
    assert not run.goodbye(0, life="b").last
    run.hello(1, life="b", restarts=1)
    assert run.goodbye(1, life="b").last
    assert run.ended().state == "finished"


def test_a_silent_rank_is_lost(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    run.hello(0)
    run.hello(1)
    run.goodbye(0)
    ended = run.ended()
    assert ended.state == "crashed"
    assert "rank 1 (host1" in ended.error
    assert "was lost: no sign of life for 1 s" in ended.error


def test_a_batch_is_a_sign_of_life(tmp_path: Path) -> None:
    """It says what an empty one would say; and a rank that counts as lost is there again with it."""
    run = Run(tmp_path, 2)
    run.hello(0)
    run.hello(1)
    wait_until(lambda: run.sign(1).durable == 0 and run.writer.status().ranks[0].state == "lost")
    run.writer.ingest(
        Sign(0, "a", Counts(logged=7, dropped={"some reason": 2}, refused=1), Doing(3, "forward", 0.5)),
        NumberedBatch(0, 1, encode_batch([encode((SCALARS, 3, time.time_ns(), USER, {"x": 1.0}))])),
    )
    (rank, _) = run.writer.status().ranks
    assert (rank.state, rank.span, rank.logged, rank.dropped) == ("running", "forward", 7, 2)
    assert rank.silent < 1
    assert rank.idle == pytest.approx(0.5, abs=0.4)
    run.goodbye(0)
    run.goodbye(1)
    run.ended()


def test_a_sign_of_life_of_a_rank_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    """It must say hello, as after the writer was started again."""
    run = Run(tmp_path, 1)
    run.hello(0)
    for rank, life in ((1, "a"), (0, "another")):
        for batch in (None, NumberedBatch(0, 0, encode_batch([]))):
            with pytest.raises(UnknownRank, match=f"rank {rank} has not said hello"):
                run.sign(rank, life=life, batch=batch)
    run.goodbye(0)
    with pytest.raises(RunEnded):
        run.sign(0)
    run.ended()


def test_what_a_killed_rank_took_with_it_is_in_the_ledger(tmp_path: Path) -> None:
    """By its last sign of life; what it had not counted by then nobody can know."""
    run = Run(tmp_path, 1)
    run.hello(0)
    run.log(0, 1, x=1.0)
    run.sign(0, Counts(logged=11, dropped={"some reason": 2}))
    assert run.ended().state == "crashed"
    (account,) = archive.load(tmp_path)[0].accounts
    assert (account.logged, account.written, account.spooled) == (11, 1, 0)
    assert account.dropped == {"some reason": 2, KILLED: 8}
    assert account.state == "lost"


def test_a_rank_that_said_how_it_ended_is_not_lost(tmp_path: Path) -> None:
    """Ray Train ends workers without their exit handlers."""
    run = Run(tmp_path, 1)
    run.hello(0)
    run.send(0, Outcome("success", None, 5))
    assert run.ended().state == "finished"


def test_ranks_that_never_came_are_named(tmp_path: Path) -> None:
    run = Run(tmp_path, 3)
    run.hello(1)
    run.goodbye(1)
    ended = run.ended()
    assert ended.state == "crashed"
    assert ended.error == "of 3 ranks, 2 never reported (rank 0, 2)"


def test_batches_are_taken_once_and_in_order(tmp_path: Path) -> None:
    run = Run(tmp_path, 1)
    run.hello(0)
    first = (SCALARS, 0, time.time_ns(), USER, {"x": 1.0})
    assert run.send(0, first, seq=0).next_seq == 1
    assert run.send(0, first, seq=0).next_seq == 1  # sent again: its ack was lost
    assert run.send(0, first, seq=5).next_seq == 1  # a gap: the writer says what is due
    assert run.writer.status().received == 1
    run.goodbye(0)
    assert run.ended().scalars["x"] == {0: 1.0}


def test_batches_that_an_earlier_writer_has_on_another_machine_are_named(tmp_path: Path) -> None:
    run = Run(tmp_path, 1)
    welcome = run.hello(0, next_seq=7)
    assert welcome.next_seq == welcome.durable == 7
    (notice,) = welcome.notices
    assert notice.startswith("Batches 0 to 6 of rank 0 are in the journal of an earlier writer that is not here")
    assert run.writer.status().notices == [notice]
    run.goodbye(0)
    run.ended()


def test_a_wrong_world_size_is_said_to_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is sure that the ranks of another size have not just gone, as those of a job that grows."""
    monkeypatch.setattr(newcomers_module, "QUIET_S", 0.5)
    run = Run(tmp_path, 4)
    run.hello(0)
    run.hello(1, world_size=2)

    notices: list[str] = []

    def told() -> bool:
        run.sign(0)
        notices.extend(run.sign(1).notices)
        return bool(notices)

    wait_until(told)
    assert notices == [
        "Rank 1 says the world size is 2, and other ranks that it is another: check RANK and WORLD_SIZE, or give each "
        "job its own OBSERVER_RUN_ID."
    ]
    run.goodbye(0)
    run.goodbye(1)
    run.ended()


def test_a_goodbye_of_another_process_ends_no_rank(tmp_path: Path) -> None:
    """It was replaced, or nobody knows it: the one that is there goes on."""
    run = Run(tmp_path, 1, rank_timeout=60.0)
    run.hello(0)
    for rank, life in ((0, "another"), (1, "a")):
        assert not run.goodbye(rank, "crashed", "ValueError: boom", life=life).last
    assert [rank.state for rank in run.writer.status().ranks] == ["running"]
    assert run.goodbye(0).last
    assert run.ended().state == "finished"


def test_who_comes_after_the_end_needs_a_new_writer(tmp_path: Path) -> None:
    run = Run(tmp_path, 1)
    run.hello(0)
    run.goodbye(0)
    with pytest.raises(RunEnded):
        run.hello(0, life="b")
    run.ended()


def test_rejected_values_are_told_once(tmp_path: Path) -> None:
    run = Run(tmp_path, 1)
    run.hello(0)
    run.log(0, 1, note="hi")
    sentence = "'note' is not logged: str 'hi' is not a number; log numbers."
    assert run.log(0, 2, note="hi").notices == [sentence]
    run.log(0, 3, text="ho")
    assert run.writer.status().rejected == 3
    # The first one again, whose answer may have been lost; a rank shows each once.
    assert run.goodbye(0).notices == [sentence, "'text' is not logged: str 'ho' is not a number; log numbers."]
    run.ended()


def test_the_status_shows_each_rank_s_latest_loss(tmp_path: Path) -> None:
    run = Run(tmp_path, 1)
    run.hello(0)
    run.log(0, 0, loss=1.0)
    run.log(0, 1, loss=0.5)
    assert run.writer.status().ranks[0].loss == 0.5
    run.goodbye(0)
    run.ended()


def test_the_status_shows_where_the_ranks_are(tmp_path: Path) -> None:
    """The job is where its first rank is; another number of steps is another training."""
    run = Run(tmp_path, 2)

    def where() -> tuple[Any, ...]:
        status = run.writer.status()
        return [rank.step for rank in status.ranks], status.step, status.max_steps, status.epoch

    run.hello(0)
    run.hello(1)
    run.send(0, Progress(5, 100, 0.5))
    run.send(1, Progress(4, 100, 0.4))
    assert where() == ([5, 4], 5, 100, 0.5)
    run.send(1, Progress(2, 50, 2.0))
    assert where() == ([5, 2], 5, 50, 2.0)
    run.send(0, Progress(6, 50, 2.5))
    assert where() == ([6, 2], 6, 50, 2.5)
    run.log(1, 7, x=1.0)
    run.log(1, 3, x=1.0)  # of an earlier step, which was late
    assert where() == ([6, 7], 7, 50, 2.5)
    run.log(0, 8, lr=0.1, step_time=0.25)
    status = run.writer.status()
    assert (status.learning_rate, status.ranks[0].step_time) == (0.1, 0.25)
    run.goodbye(0)
    run.goodbye(1)
    run.ended()


def test_the_status_names_whom_the_ranks_wait_for(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    run.hello(0)
    run.hello(1)
    assert run.writer.status().straggler is None
    run.writer._parts.reducer.timings._stragglers.current = slow = Straggler(1, "data", 0.5)
    assert run.writer.status().straggler == str(slow)
    run.goodbye(0)
    run.goodbye(1)
    run.ended()


def test_the_status_shows_the_job_s_loss_or_else_the_mean_of_its_ranks(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    run.hello(0)
    run.hello(1)
    for rank, loss in ((0, 1.0), (1, 3.0)):
        run.send(rank, (SCALARS, 0, time.time_ns(), RANK, {"loss": loss}))
    assert run.writer.status().loss == 2.0
    for rank, loss in ((0, 5.0), (1, 7.0)):
        run.log(rank, 1, loss=loss)
    assert run.writer.status().loss == 5.0
    run.goodbye(0)
    run.goodbye(1)
    run.ended()


def test_original_times_reach_the_file(tmp_path: Path) -> None:
    run = Run(tmp_path, 1)
    run.hello(0)
    run.send(0, (SCALARS, 3, 1_700_000_000_250_000_000, USER, {"x": 1.0}))
    run.goodbye(0)
    assert run.ended().times["x"][3] == pytest.approx(1_700_000_000.25)


@pytest.mark.parametrize(("mode", "kept"), [("offline", 3), ("local", 2)])
def test_nan_is_kept_from_the_local_dashboard_only(tmp_path: Path, mode: str, kept: int) -> None:
    """There a NaN breaks the project's table; everywhere else it is in the record."""
    run = Run(tmp_path, 1, mode=mode)
    run.hello(0)
    for step, value in enumerate([1.0, math.nan, 3.0]):
        run.log(0, step, x=value)
    run.goodbye(0)
    ended = run.ended()
    assert len(ended.scalars["x"]) == kept
    assert run.writer.status().withheld == 3 - kept


def test_cloud_without_a_key_goes_on_in_the_journal_and_says_how_to_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "nobody"))
    monkeypatch.setenv("SWANLAB_PROJECT", "breaks-swanlab")
    run = Run(tmp_path / "logs", 1, mode="cloud")
    run.hello(0)
    run.log(0, 1, x=1.0)
    run.goodbye(0)
    wait_until(lambda: run.writer.status().closed)
    status = run.writer.status()
    told, gave_up = status.notices
    assert "The SwanLab cloud cannot be used (no API key was provided" in told
    assert f"swanlab-ray sync {status.journal}" in told
    assert "does not have the whole run" in gave_up
    assert status.thinned == 1
    assert status.received == 1


def test_a_log_dir_that_cannot_be_written_is_said_and_nothing_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "JOURNAL_DEADLINE_S", 0.5)
    (tmp_path / "file").write_text("")
    run = Run(tmp_path / "file" / "logs", 1, rank_timeout=60.0)
    welcome = run.hello(0)
    assert any("cannot be written" in notice and "Not a directory" in notice for notice in welcome.notices)
    event = encode((SCALARS, 0, time.time_ns(), USER, {"x": 1.0}))
    ack = run.sign(0, batch=NumberedBatch(0, 1, encode_batch([event])))
    assert (ack.next_seq, ack.durable) == (1, 0)
    (tmp_path / "file").unlink()  # somebody mends it
    wait_until(lambda: run.sign(0).durable == 1)
    run.goodbye(0)
    wait_until(lambda: run.writer.status().closed)
    assert "The journal is written again." in run.writer.status().notices


def test_time_goes_on_in_a_journal_in_which_nothing_else_is_written(tmp_path: Path) -> None:
    """Once in a while, for whoever reads it from another machine."""
    run = Run(tmp_path, 1, rank_timeout=60.0)
    run.hello(0)
    began, each = time.monotonic(), ticker.ALIVE_TICK_S
    for seconds in (each - 5, each + 1, each + 2, 2 * each - 5, 2 * each + 2):
        with run.writer._members.lock:
            run.writer._ticker._keep_time(began + seconds)
    assert run.writer._journal.settled(10)
    (path,) = journal_files(run.writer._parts.directory).values()
    assert [type(found[1]) for found in entries(path) if not isinstance(found, Damaged)].count(Tick) == 2
    run.goodbye(0)
    run.ended()


def test_the_writer_s_log_says_now_and_then_how_the_run_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ticker, "STATUS_LINE_S", 0.1)
    said = ""

    def told() -> bool:
        nonlocal said
        said += "".join(capsys.readouterr())
        return "running | ranks 1/1 |" in said

    run = Run(tmp_path, 1, rank_timeout=60.0)
    run.hello(0)
    wait_until(told)
    run.goodbye(0)
    run.ended()


def test_status_line_and_repr(tmp_path: Path) -> None:
    from swanlab_ray.actors.wire.status import status_line

    run = Run(tmp_path, 2)
    run.hello(0)
    run.log(0, 12, loss=2.5)
    assert status_line(run.writer.status()).startswith("running | step 12 | ranks 1/2 | loss 2.5 | events 1 |")
    assert repr(run.writer).startswith("SwanLabWriter(project=p, run=run")
    run.goodbye(0)
    run.ended()
