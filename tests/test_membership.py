"""Restarts, two jobs under one id, worlds that grow and shrink, ranks that come back, clocks that differ."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from pydantic import SecretStr

from swanlab_ray.actors.journal.reading import Damaged, entries
from swanlab_ray.actors.journal.records import Arrived, Entry, Returned
from swanlab_ray.actors.membership import lost
from swanlab_ray.actors.membership import newcomers as newcomers_module
from swanlab_ray.actors.membership.clocks import RunClock, Skew
from swanlab_ray.actors.runs import disks
from swanlab_ray.actors.wire.codec import encode_batch
from swanlab_ray.actors.wire.events import SCALARS, USER, Outcome, State
from swanlab_ray.actors.wire.messages import (
    Ack,
    Counts,
    Declined,
    Farewell,
    Goodbye,
    Hello,
    NumberedBatch,
    RunEnded,
    Sign,
    UnknownRank,
)
from swanlab_ray.actors.wire.version import package_version
from swanlab_ray.actors.writer.actor import Writer
from swanlab_ray.actors.writer.parts import Parts
from swanlab_ray.observer.encoding.numbers import encode
from swanlab_ray.observer.history import archive
from swanlab_ray.observer.job.identity import Launch
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.ray_cluster.link import Connection, RayLink
from swanlab_ray.observer.transport import flusher as flusher_module
from swanlab_ray.observer.transport import window as window_module
from swanlab_ray.observer.transport.link import LinkBroken
from tests.conftest import wait_until
from tests.incarnations import Cluster, Link, logged_in, mortal, rank, settings_for
from tests.swanlab_cloud import KEY, SwanLabCloud

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

make_sink = Parts._make_sink
HOUR_NS = 3600 * 10**9
NOTHING = Counts()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    mortal(monkeypatch)
    monkeypatch.setattr(flusher_module, "RETRY_S", (0.01, 0.05))
    monkeypatch.setattr(window_module, "BEAT_S", 0.05)
    monkeypatch.setattr(newcomers_module, "BEAT_S", 0.05)
    monkeypatch.setattr(newcomers_module, "QUIET_S", 0.6)
    monkeypatch.setattr(lost, "FAILED_RANK_GRACE_S", 0.5)


ON_ONE_DISK = "The run lies on the disk of "


class Told:
    """A writer and what ranks of any machine say to it, word by word."""

    def __init__(self, log_dir: Path, world_size: int = 1, **settings: Any) -> None:
        self.cluster = Cluster(settings_for(log_dir, **{"rank_timeout": 60.0} | settings))
        self.world_size = world_size

    @property
    def writer(self) -> Writer:
        return self.cluster.find()

    def hello(self, number: int, life: str = "a", **more: Any) -> Ack | Declined:
        values: dict[str, Any] = {"world_size": self.world_size, "next_seq": 0, "nonce": "job", "settings": None} | more
        answer: Ack | Declined = self.writer.hello(
            Hello(
                rank=number, local_rank=number, host=f"host{number}", pid=100 + number, pid_namespace="elsewhere",
                gpu=None, life=f"{life}{number}", **values,
            )
        )  # fmt: skip
        return answer

    def welcome(self, number: int, life: str = "a", **more: Any) -> Ack:
        answer = self.hello(number, life, **more)
        assert isinstance(answer, Ack), answer
        return answer

    def sign(self, number: int, life: str = "a", batch: NumberedBatch | None = None, **more: Any) -> Ack:
        answer: Ack = self.writer.ingest(Sign(number, f"{life}{number}", NOTHING, **more), batch)
        return answer

    def send(self, number: int, *events: Any, life: str = "a", seq: int = 0) -> Ack:
        batch = encode_batch([encode(event) for event in events])
        ack = self.sign(number, life, NumberedBatch(seq, len(events), batch))
        assert self.writer._journal.settled(10)
        assert self.writer._parts.decoding.settled(10)
        return ack

    def goodbye(self, number: int, state: State = "success", error: str | None = None, **more: Any) -> Farewell:
        values: dict[str, Any] = {"life": "a", "ended_ns": time.time_ns()} | more
        values["life"] += str(number)
        answer: Farewell = self.writer.goodbye(Goodbye(rank=number, state=state, error=error, counts=NOTHING, **values))
        return answer

    def end(self) -> tuple[str, str | None]:
        wait_until(lambda: self.writer.status().closed)
        status = self.writer.status()
        return status.state, status.error

    def notices(self) -> list[str]:
        """But that where the run lies."""
        return [notice for notice in self.writer.status().notices if not notice.startswith(ON_ONE_DISK)]

    def journal(self, *kinds: type) -> list[Entry]:
        assert self.writer._journal.settled(10)
        found = [entry for path in self.cluster.files.journals for entry in entries(path)]
        return [item[1] for item in found if not isinstance(item, Damaged) and isinstance(item[1], kinds)]


def started_by(launch: Launch, patch: pytest.MonkeyPatch, make: Callable[[], Observer]) -> Observer:
    """A rank of that launch."""
    patch.setattr("swanlab_ray.observer.observer.which_launch", lambda: launch)
    observer = make()
    observer._hello(0)  # it is asked once
    return observer


# Restarts.


def test_a_higher_attempt_of_the_same_job_is_a_restart_though_the_earlier_process_was_just_heard(
    tmp_path: Path,
) -> None:
    run = Told(tmp_path, 2)
    for number in (0, 1):
        run.welcome(number)
    run.welcome(1, "b", attempt=1)
    run.welcome(0, "b", attempt=1)
    assert run.notices() == ["The training was started again, after its ranks had ended without a word"]
    with pytest.raises(UnknownRank):
        run.sign(1)
    for number in (0, 1):
        run.goodbye(number, life="b")
    assert run.end() == ("success", None)


def test_a_restart_without_an_attempt_is_let_in_once_the_earlier_process_is_silent(tmp_path: Path) -> None:
    """An elastic launcher starts ranks again without counting it."""
    run = Told(tmp_path)
    run.welcome(0)
    assert run.hello(0, "b") == Declined("")  # it may have died just now: there is nothing to tell yet
    wait_until(lambda: isinstance(run.hello(0, "b"), Ack))
    assert [notice.partition(",")[0] for notice in run.notices()] == ["The training was started again"]
    run.goodbye(0, life="b")
    assert run.end() == ("success", None)


@pytest.mark.parametrize("nonces", [("one", "two"), ("", ""), ("one", "")])
def test_two_jobs_under_one_run_id_never_take_turns(
    nonces: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second one is told why it has to wait, keeps what it logs, and goes on when the first one is not heard."""
    cluster = Cluster(settings_for(tmp_path))
    link = Link(cluster)
    first = started_by(Launch(nonces[0], 0), monkeypatch, lambda: rank(cluster, link))
    first.log({"x": 0}, 0)
    assert first.flush()
    second = started_by(Launch(nonces[1], 0), monkeypatch, lambda: rank(cluster, Link(cluster)))
    second.log({"y": 0}, 0)
    sentence = "Another job reports under run id 'r' (rank 0: "
    wait_until(lambda: sentence in caplog.text)
    for step in range(1, 20):
        first.log({"x": step}, step)
        assert first.flush()
        second.log({"y": step}, step)
    arrived = [found[1] for found in entries(cluster.files.paths[0]) if not isinstance(found, Damaged)]
    assert sum(isinstance(entry, Arrived) for entry in arrived) == 1
    assert first.statistics().reconnections == 0
    assert caplog.text.count(sentence) == 1
    assert "said hello twice" not in caplog.text
    (notice,) = cluster.find().status().notices
    assert notice.startswith("Another process (")
    link.cut = True
    assert second.flush(20)
    link.cut = False  # now the first one has to wait
    first.log({"x": 99}, 99)
    assert not first.flush(0.5)
    assert second.statistics().reconnections == 0
    assert second.finish()
    assert not first.finish(timeout=0.5)
    assert first.statistics().spooled == 1
    run = cluster.files
    assert sorted(values["y"] for _, _, values in logged_in(run) if "y" in values) == list(range(20))
    assert sorted(values["x"] for _, _, values in logged_in(run) if "x" in values) == [*range(20), 99]
    assert "an earlier writer" not in caplog.text


def test_another_job_does_not_mix_with_a_larger_or_smaller_one(tmp_path: Path) -> None:
    run = Told(tmp_path, 2)
    run.welcome(0)
    run.welcome(1)
    for _ in range(3):
        assert isinstance(run.hello(5, "b", nonce="other", world_size=8), Declined)
        run.sign(0)
    assert run.writer.status().world_size == 2
    for number in (0, 1):
        run.goodbye(number)
    assert run.end() == ("success", None)


def test_a_job_of_another_project_is_declined(tmp_path: Path) -> None:
    """Two users of a cluster with one run id: neither reports to the other's project."""
    run = Told(tmp_path)
    ours = run.cluster.settings.public()
    run.welcome(0, settings=ours)
    declined = run.hello(0, "b", nonce="other", settings=ours | {"project": "theirs", "workspace": "team"})
    assert declined == Declined(
        "Another job reports under run id 'r', to project 'p', and this one to 'team/theirs': give each job its own "
        "OBSERVER_RUN_ID. What this one logs is kept until that one has ended."
    )
    run.goodbye(0)
    assert run.end() == ("success", None)


def test_a_process_that_comes_back_after_its_successor_has_finished_changes_nothing(tmp_path: Path) -> None:
    run = Told(tmp_path, 2)
    run.welcome(0)
    run.welcome(1)
    run.welcome(1, "b", attempt=1)
    run.goodbye(1, life="b")
    declined = run.hello(1, "a")
    assert isinstance(declined, Declined)
    assert declined.sentence == "Rank 1 was started again meanwhile: this process came too late to this run."
    run.goodbye(0)
    assert run.end() == ("success", None)


def test_a_process_that_was_replaced_goes_on_where_it_was(tmp_path: Path) -> None:
    """Its successor has gone: what it sent before is known, and nothing is said of another machine's journal."""
    run = Told(tmp_path)
    run.welcome(0)
    for seq in range(3):
        run.send(0, (SCALARS, seq, 1, USER, {"x": seq}), seq=seq)
    run.welcome(0, "b", attempt=1)
    run.send(0, (SCALARS, 0, 1, USER, {"x": 0}), life="b")
    answers: list[Ack | Declined] = []

    def let_in() -> bool:
        answers.append(run.hello(0, "a", next_seq=3))
        return isinstance(answers[-1], Ack)

    wait_until(let_in)
    assert answers[-1].next_seq == answers[-1].durable == 3  # type: ignore[union-attr]
    run.send(0, (SCALARS, 3, 1, USER, {"x": 3}), seq=3)
    run.goodbye(0)
    assert run.end() == ("success", None)
    assert not any("earlier writer" in notice for notice in run.notices())
    (account,) = archive.load_run(run.cluster.files).accounts
    assert account.written == 5


def test_a_rank_of_an_older_version_is_understood(tmp_path: Path) -> None:
    """It tells neither attempt nor nonce, version, settings or clock."""
    run = Told(tmp_path)
    run.welcome(0, nonce="")
    assert run.sign(0)
    run.goodbye(0, "crashed", "ValueError: boom", ended_ns=7)
    assert run.end() == ("crashed", "rank 0 (host0, pid 100): ValueError: boom")


# Several machines.


@pytest.mark.parametrize(("kind", "told"), [("ext4", 1), ("overlay", 1), ("nfs4", 0), ("lustre", 0), ("", 0)])
def test_a_run_of_several_machines_says_once_that_it_lies_on_one_of_them(
    kind: str, told: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "file_system", lambda path: kind)
    run = Told(tmp_path, 3)
    run.welcome(0)
    assert not run.writer.status().notices
    for number in (1, 2):
        run.welcome(number)
    sentences = [notice for notice in run.writer.status().notices if notice.startswith(ON_ONE_DISK)]
    assert len(sentences) == told
    assert all(f"{socket.gethostname()} alone ({tmp_path}" in sentence for sentence in sentences)


# The world grows and shrinks.


def test_an_elastic_job_of_two_then_three_then_two_ranks_is_one_run(tmp_path: Path) -> None:
    run = Told(tmp_path, 2)
    for number in (0, 1):
        run.welcome(number)
    run.world_size = 3
    run.welcome(2, "b")  # the new rank comes first
    for number in (0, 1):
        assert run.sign(number)
        run.goodbye(number, "aborted", "SIGTERM")
        run.welcome(number, "b")
    assert run.writer.status().world_size == 3
    run.world_size = 2
    run.goodbye(1, "aborted", "SIGTERM", life="b")
    run.welcome(1, "c")
    assert run.writer.status().world_size == 2
    assert run.hello(2, "b") == Declined("Rank 2 was started again meanwhile: this process came too late to this run.")
    wait_until(lambda: isinstance(run.hello(0, "c"), Ack))  # rank 0 was killed without a word
    assert {notice.partition(",")[0] for notice in run.notices()} == {"The training was started again"}
    for number in (0, 1):
        run.goodbye(number, life="c")
    assert run.end() == ("success", None)
    assert [account.state for account in archive.load_run(run.cluster.files).accounts] == ["success", "success", "lost"]


def test_ranks_of_a_job_that_is_over_are_no_members_of_the_next_one(tmp_path: Path) -> None:
    """Three ranks, one of which failed; then two, whose writer is killed meanwhile."""
    run = Told(tmp_path, 3)
    for number in range(3):
        run.welcome(number)
    for number in range(3):
        run.goodbye(number, "crashed", "ValueError: boom")
    assert run.end()[0] == "crashed"
    run.cluster.kill()
    run.world_size = 2
    for number in range(2):
        run.welcome(number, "b", nonce="next")
    assert run.writer._journal.settled(10)
    run.cluster.kill()
    for number in range(2):
        run.welcome(number, "b", nonce="next")
        run.goodbye(number, life="b")
    assert run.end() == ("success", None)


def test_a_process_that_an_agent_has_seen_end_is_lost_long_before_the_timeout(tmp_path: Path) -> None:
    """On a machine that the writer does not see. One that comes back in another life is not."""
    run = Told(tmp_path, 3, rank_timeout=600.0)
    for number in range(3):
        run.welcome(number)
    run.writer.gone(1, "a1")
    run.writer.gone(2, "of an earlier life")
    wait_until(lambda: run.writer.status().ranks[1].state == "lost", 30)
    assert run.writer.status().ranks[1].error == "its process is gone (killed?)"
    assert [run.writer.status().ranks[number].state for number in (0, 2)] == ["running", "running"]


def test_a_script_that_connects_on_rank_0_only_has_its_end(tmp_path: Path) -> None:
    run = Told(tmp_path, 4, rank_timeout=1.0)
    run.welcome(0)
    run.goodbye(0)
    assert run.end() == ("success", None)
    assert run.notices() == ["Only rank 0 has reported of 4 ranks: the end of this run is its word alone."]


# Ranks that come back.


def test_a_lost_rank_that_comes_back_after_the_end_makes_it_true(tmp_path: Path) -> None:
    """Two of three ranks finish, the third is cut off for longer than the run waits, and has trained on meanwhile."""
    cluster = Cluster(settings_for(tmp_path, rank_timeout=1.0))
    links = [Link(cluster) for _ in range(3)]
    ranks = [rank(cluster, links[number], number, 3) for number in range(3)]
    for observer in ranks:
        observer.log({"x": 0}, 0)
        assert observer.flush()
    links[2].cut = True
    for step in range(1, 10):
        ranks[2].log({"x": step}, step)
    for observer in ranks[:2]:
        assert observer.finish()
    wait_until(lambda: cluster.find().status().closed)
    ended = archive.load_run(cluster.files)
    assert ended.state == "crashed"
    assert "rank 2" in (ended.summary.finished.error or "")  # type: ignore[union-attr]
    cluster.kill()
    links[2].cut = False
    assert ranks[2].flush(20)
    assert archive.load_run(cluster.files).state != "crashed"  # it has not ended after all
    assert ranks[2].finish()
    wait_until(lambda: cluster.find().status().closed)
    run = archive.load_run(cluster.files)
    assert run.state == "success"
    assert [account.state for account in run.accounts] == ["success"] * 3
    assert sorted(step for number, step, _ in logged_in(cluster.files) if number == 2) == list(range(10))


def test_only_some_of_the_lost_ranks_come_back(tmp_path: Path) -> None:
    run = Told(tmp_path, 3, rank_timeout=1.0)
    for number in range(3):
        run.welcome(number)
    run.goodbye(0)
    assert run.end()[1] == "rank 1 (host1, pid 101) was lost: no sign of life for 1 s; then lost: rank 2"
    run.cluster.kill()
    run.welcome(2)
    assert run.journal(Returned)
    run.goodbye(2)
    assert run.end() == ("crashed", "rank 1 (host1, pid 101) was lost: no sign of life for 1 s")


def test_a_rank_that_had_left_does_not_open_the_run_again(tmp_path: Path) -> None:
    run = Told(tmp_path)
    run.welcome(0)
    run.goodbye(0)
    assert run.end() == ("success", None)
    run.cluster.kill()
    with pytest.raises(RunEnded):
        run.hello(0)


def test_a_lost_rank_of_a_job_before_is_no_member_of_the_present_one(tmp_path: Path) -> None:
    run = Told(tmp_path, 2, rank_timeout=1.0)
    for number in (0, 1):
        run.welcome(number)
    run.goodbye(0)
    assert run.end()[0] == "crashed"
    run.cluster.kill()
    run.welcome(0, "b", nonce="")
    assert run.hello(1, "a", nonce="") == Declined(
        "Rank 1 was started again meanwhile: this process came too late to this run."
    )
    run.welcome(1, "b", nonce="")
    for number in (0, 1):
        run.goodbye(number, life="b")
    assert run.end() == ("success", None)


@pytest.mark.parametrize("said", [None, Outcome("crashed", "ValueError: boom", 1)])
def test_a_rank_that_is_heard_again_runs_again(said: Outcome | None, tmp_path: Path) -> None:
    """Also where it counted as failed since it had said how it would end, were it not heard any more."""
    run = Told(tmp_path, 2, rank_timeout=1.0)
    for number in (0, 1):
        run.welcome(number)
    if said is not None:
        run.send(1, said)

    def states() -> list[str]:
        assert run.sign(0)
        return [member.state for member in run.writer.status().ranks]

    wait_until(lambda: states() == ["running", "crashed" if said else "lost"])
    assert run.sign(1)
    assert states() == ["running", "running"]
    for number in (0, 1):
        run.goodbye(number)
    assert run.end() == ("success", None)


# Waiting for a restart.


def test_a_run_waits_for_a_restart_as_long_as_it_is_told(tmp_path: Path) -> None:
    run = Told(tmp_path, restart_timeout=1.5)
    run.welcome(0, restarts=3)
    began = time.monotonic()
    run.goodbye(0, "crashed", "ValueError: boom")
    assert run.end()[0] == "crashed"
    assert time.monotonic() - began > 1.4


def test_a_run_does_not_wait_where_no_start_is_left(tmp_path: Path) -> None:
    """The third of three restarts has failed; this writer is new, and has seen none of those before."""
    run = Told(tmp_path)
    run.welcome(0, restarts=3, attempt=3)
    assert run.goodbye(0, "crashed", "ValueError: boom").last


def test_peers_that_are_being_started_again_are_waited_for(tmp_path: Path) -> None:
    """Rank 1 still loads its model when rank 0 is done; of the only restart there is no other left."""
    run = Told(tmp_path, 2, rank_timeout=1.0)
    for number in (0, 1):
        run.welcome(number, restarts=1)
    run.goodbye(1, "crashed", "ValueError: boom")
    run.goodbye(0, "aborted", "SIGTERM")
    run.welcome(0, "b", restarts=1, attempt=1)
    run.goodbye(0, life="b")
    threading.Event().wait(1.5)  # longer than rank_timeout
    assert run.writer.status().state == "running"
    run.welcome(1, "b", restarts=1, attempt=1)
    run.goodbye(1, life="b")
    assert run.end() == ("success", None)


# Clocks.


@pytest.mark.parametrize("hours", [-1, 0, 1])
def test_the_first_failure_is_the_cause_whatever_the_clocks_say(hours: int, tmp_path: Path) -> None:
    """Rank 1 fails first; its machine's clock is ahead, or behind."""
    run = Told(tmp_path, 2)

    def now(number: int) -> int:
        return time.time_ns() + number * hours * HOUR_NS

    for number in (0, 1):
        run.welcome(number, sent_ns=now(number))
        run.sign(number, sent_ns=now(number))
    failed = {1: now(1) - 200_000_000, 0: now(0)}
    run.goodbye(0, "crashed", "connection closed by peer", ended_ns=failed[0], sent_ns=now(0))
    run.goodbye(1, "crashed", "ValueError: boom", ended_ns=failed[1], sent_ns=now(1))
    assert run.end() == ("crashed", "rank 1 (host1, pid 101): ValueError: boom")


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_lost_rank_and_a_failed_one_are_compared_on_one_scale(hours: int, tmp_path: Path) -> None:
    """Rank 0 fails, whose clock is off, and rank 1 is not heard from then on: the failure came first."""
    run = Told(tmp_path, 2)
    run.welcome(0, sent_ns=time.time_ns() + hours * HOUR_NS)
    run.welcome(1)
    now = time.time_ns() + hours * HOUR_NS
    run.sign(1)
    run.goodbye(0, "crashed", "ValueError: boom", ended_ns=now - 10**9, sent_ns=now)
    assert run.end()[1] == "rank 0 (host0, pid 100): ValueError: boom"


def test_what_a_rank_said_of_its_end_is_on_the_same_scale(tmp_path: Path) -> None:
    run = Told(tmp_path, 2, rank_timeout=1.0)
    ahead = time.time_ns() + HOUR_NS
    for number in (0, 1):
        run.welcome(number, sent_ns=ahead if number == 1 else time.time_ns())
    run.send(1, Outcome("crashed", "ValueError: boom", ahead))
    run.goodbye(0, "crashed", "connection closed by peer", sent_ns=time.time_ns(), ended_ns=time.time_ns() + 10**8)
    assert run.end()[1] == "rank 1 (host1, pid 101): ValueError: boom"


@pytest.mark.parametrize("hours", [-1, 1])
def test_the_writer_s_clock_is_set_between_two_failures(
    hours: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Told(tmp_path, 3, rank_timeout=1.0)
    for number in range(3):
        run.welcome(number, sent_ns=time.time_ns())
    run.goodbye(1, "crashed", "ValueError: boom", sent_ns=time.time_ns())
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + hours * HOUR_NS)
    run.goodbye(2, "crashed", "connection closed by peer", ended_ns=real(), sent_ns=real())
    assert run.end()[1] == "rank 1 (host1, pid 101): ValueError: boom"  # rank 0 is lost


def test_the_writer_s_time_never_goes_back() -> None:
    unix, monotonic = [10 * HOUR_NS], [5]
    clock = RunClock(0, lambda: unix[0], lambda: monotonic[0])
    assert clock.now_ns() == 10 * HOUR_NS
    unix[0] -= HOUR_NS
    monotonic[0] += 7
    assert clock.now_ns() == 10 * HOUR_NS + 7
    successor = RunClock(clock.now_ns(), lambda: unix[0], lambda: 0)  # on a machine whose clock is behind
    assert successor.now_ns() == clock.now_ns()


def test_a_clock_that_is_set_while_its_rank_runs() -> None:
    skew = Skew()
    for second in range(20):
        skew.heard((second + 1) * 10**9, (second + 1) * 10**9 + 5_000_000)
    assert skew.corrected(10**9) == 10**9  # kept in step: what remains is the way of a message
    for sign in (1, -1):
        ahead = sign * HOUR_NS
        skew.heard(21 * 10**9 + ahead, 21 * 10**9 + 5_000_000)
        assert abs(skew.corrected(20 * 10**9 + ahead) - 20 * 10**9) <= 5_000_000


def test_a_message_that_was_long_on_its_way_tells_nothing_of_the_clock() -> None:
    """Such as the hello that waits for its writer to be created."""
    skew = Skew()
    skew.heard(10**9, 30 * 10**9)
    skew.heard(31 * 10**9, 31 * 10**9 + 1)
    assert skew.corrected(10**9) == 10**9


def test_calls_that_were_all_on_their_way_for_long_tell_nothing_of_the_clock() -> None:
    """As of a writer that stood still for three seconds, and hears then what a rank has sent meanwhile."""
    skew = Skew()
    for second in range(5):
        skew.heard(second * 10**9 + 1, second * 10**9 + 5_000_000)
    for tenth in range(50, 80):
        skew.heard(tenth * 10**8, 8 * 10**9 + tenth)
    assert skew.corrected(10**9) == 10**9


# What is told.


def test_settings_that_differ_are_told_once_by_name(tmp_path: Path) -> None:
    run = Told(tmp_path, 3)
    ours = run.cluster.settings.public()
    same = {"version": package_version()}
    assert run.welcome(0, settings=ours | {"log_dir": "/elsewhere", "strict": True}, **same).notices == []
    assert run.welcome(1, settings=ours | {"rank_series": 2, "experiment_name": "mine"}, **same).notices == [
        "Rank 1 (host1) was given other settings than the run goes by: experiment_name 'mine' not None, rank_series 2 "
        "not 16. Give all ranks the same; those of the rank that came first count."
    ]
    assert run.welcome(2, settings=ours | {"rank_series": 2}, **same).notices == []
    for number in range(3):
        run.goodbye(number)
    assert run.end() == ("success", None)


def test_versions_that_differ_are_told(tmp_path: Path) -> None:
    """What one of them does not know is no difference."""
    run = Told(tmp_path)
    older = {name: value for name, value in run.cluster.settings.public().items() if name != "restart_timeout"}
    (told,) = run.welcome(0, version="0.0.1", settings=older).notices
    assert told.startswith("Rank 0 (host0) runs version 0.0.1 of swanlab-ray, the writer ")
    run.goodbye(0)
    assert run.end() == ("success", None)


def test_refusals_are_told_with_the_answer_to_the_goodbye_though_another_was_lost(tmp_path: Path) -> None:
    run = Told(tmp_path)
    run.welcome(0)
    run.send(0, (SCALARS, 0, 1, USER, {"note": "hi"}))
    assert run.sign(0)  # the answer that tells it does not arrive
    assert run.goodbye(0).notices == ["'note' is not logged: str 'hi' is not a number; log numbers."]
    assert run.end() == ("success", None)


@pytest.mark.takes(8)
def test_refusals_are_told_though_much_waits_to_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Told(tmp_path)
    run.welcome(0)
    slow = threading.Event()
    decoding = run.writer._parts.decoding
    real = decoding._events
    monkeypatch.setattr(decoding, "_events", lambda entry: (slow.wait(1.5), real(entry))[1])
    batch = encode_batch([encode((SCALARS, 0, 1, USER, {"note": secrets.token_hex(2_000_000)}))])
    assert len(batch) > 1 << 20  # packed
    run.sign(0, batch=NumberedBatch(0, 1, batch))
    assert run.writer._journal.settled(10)
    (told,) = run.goodbye(0).notices
    assert told.startswith("'note' is not logged: str ")
    assert run.end() == ("success", None)


def test_more_names_than_are_told_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swanlab_ray.actors.writer.run_view.REJECTED", 3)
    run = Told(tmp_path)
    run.welcome(0)
    run.send(0, (SCALARS, 0, 1, USER, {f"n{number}": "text" for number in range(9)}))
    ack = run.sign(0)
    assert len(ack.notices) == 4
    assert ack.notices[-1] == "More than 3 names are not logged; the rest of them are counted, and not told."
    assert run.writer.status().rejected == 9
    run.goodbye(0)
    assert run.end() == ("success", None)


def test_a_rank_s_key_is_used_where_the_writer_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was exported on one machine only, and another one's rank came first. A key for another host is not."""
    monkeypatch.setattr("swanlab_ray.actors.delivery.cloud.RETRY_S", (0.02, 0.2))
    monkeypatch.setattr(Parts, "_make_sink", make_sink)
    with SwanLabCloud() as cloud:
        for name, value in cloud.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("SWANLAB_API_KEY")
        monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "nobody"))
        run = Told(tmp_path, mode="cloud")
        run.welcome(0)
        run.send(0, (SCALARS, 0, 1, USER, {"x": 1.0}))
        host = run.cluster.settings.api_host
        assert host is not None
        run.writer.take_key(SecretStr("of-another-host"), "https://elsewhere.example")
        run.writer.take_key(SecretStr(KEY), host)
        wait_until(lambda: run.writer.status().written == 1)
        run.goodbye(0)
        assert run.end() == ("success", None)
        assert run.notices() == []
        assert cloud.only().points == {"x": {0: 1.0}}


def test_a_hello_holds_no_secret(tmp_path: Path) -> None:
    """It stands in logs and errors; the key travels in a call of its own."""
    key = "a-key-that-nobody-reads"
    cluster = Cluster(settings_for(tmp_path, api_key=key))
    observer = rank(cluster, Link(cluster))
    hello = observer._hello(0)
    assert hello.settings is not None
    assert hello.settings["project"] == "p"
    assert key not in repr(hello) + str(hello.settings)
    assert observer.finish()


# The actor itself.


def test_the_writer_of_a_run_that_has_just_ended_is_waited_out_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name still leads to it for a moment. One that dies for longer is told of."""
    link = RayLink(settings_for(tmp_path), "r", lambda: Connection("nowhere"))
    error = LinkBroken("ActorDiedError: The actor died unexpectedly before finishing this task.")
    error.__cause__ = ray.exceptions.ActorDiedError()
    assert link._is_ending(error)
    monkeypatch.setattr("swanlab_ray.observer.ray_cluster.link.DYING_S", 0.0)
    assert not link._is_ending(error)
    other = LinkBroken("no route to host")
    other.__cause__ = OSError()
    assert not link._is_ending(other)


def test_the_actor_ends_whatever_fails_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Told(tmp_path)
    run.welcome(0)

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("no more threads")

    ticker = run.writer._ticker
    monkeypatch.setattr(ticker, "_leave", fails)
    monkeypatch.setattr(ticker._telling, "look", fails)
    ended = threading.Event()
    monkeypatch.setattr(ticker, "_die", ended.set)
    run.goodbye(0)
    assert ended.wait(10)
    assert "self._leave()" in "".join(capsys.readouterr())  # the writer's log says where


def test_a_thousand_ranks_and_five_thousand_names(tmp_path: Path) -> None:
    """In one writer: how it ends and what is counted does not depend on their number."""
    size, names = 1024, 5000
    run = Told(tmp_path, size)
    for number in range(size):
        run.welcome(number)
        run.sign(number)
    batch = encode_batch([encode((SCALARS, 0, 1, USER, {f"name{n}": float(n) for n in range(names)}))])
    for number in range(2):
        run.sign(number, batch=NumberedBatch(0, 1, batch))
    status = run.writer.status()
    assert (len(status.ranks), status.world_size) == (size, size)
    for number in range(size - 1):
        assert not run.goodbye(number).last
    assert run.goodbye(size - 1).last
    assert run.end() == ("success", None)
    assert run.writer.status().received == 2
    reducer = run.writer._parts.reducer
    assert reducer is not None
    assert {name for _, values in reducer.sink.rows for name in values} >= {"name0", f"name{names - 1}"}  # type: ignore[attr-defined]
