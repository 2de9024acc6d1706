"""The parts of a writer, one thread at a time: what must hold between two of them whatever else runs just then."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from swanlab_ray.actors.delivery import notes
from swanlab_ray.actors.journal.records import Batch, Finished, Tick
from swanlab_ray.actors.wire.codec import encode_batch
from swanlab_ray.actors.wire.events import SCALARS, USER
from swanlab_ray.actors.wire.messages import Counts, Goodbye, Hello, Sign
from swanlab_ray.actors.writer.parts import Parts
from swanlab_ray.observer.encoding.numbers import encode
from tests.conftest import wait_until
from tests.incarnations import MortalDisk, NoSwanLab, mortal, settings_for

LIFE = "a" * 16
HELLO = Hello(rank=0, world_size=2, local_rank=0, host="h", pid=1, pid_namespace="elsewhere", life=LIFE, next_seq=0)


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    mortal(monkeypatch)
    return Parts("r", settings_for(tmp_path))


def test_a_writer_that_is_replaced_while_a_rank_says_hello_opens_no_run(parts: Parts) -> None:
    """The hello's own entry is the first that is committed, and so where the successor is noticed."""
    parts.start()
    parts.directory.joinpath("journal-000002.log").touch()
    with parts.members.lock:
        parts.members.greet(HELLO, time.monotonic())
        wait_until(parts.reducer.sink.closed.is_set)
        parts.reducer.open()
    assert parts.journal.fenced
    assert not parts.reducer.opened
    assert parts.reducer.sink.run_dir is None


def test_a_writer_that_is_replaced_leaves_the_end_of_the_run_to_its_successor(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(NoSwanLab, "_close", lambda self, state, error: closed.append(state))
    monkeypatch.setattr(notes, "OPENED_S", 0.1)
    parts.start()
    parts.reducer.open()
    parts.reducer.finish(Finished(time_ns=1, state="success"))
    parts.directory.joinpath("journal-000002.log").touch()
    parts.journal.append(Tick())
    assert parts.reducer.sink.closed.wait(20)
    assert closed == []
    (told,) = parts.notices.all
    assert told.startswith("Another writer has taken over run r")


def test_a_journal_that_could_not_be_begun_at_first_is_followed_from_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, full = MortalDisk.create, [OSError(errno.ENOSPC, "No space left on device")]

    def full_once(self: MortalDisk, path: Path) -> int:
        if full:
            raise full.pop()
        return create(self, path)

    mortal(monkeypatch)
    monkeypatch.setattr(MortalDisk, "create", full_once)
    parts = Parts("r", settings_for(tmp_path))
    assert not full
    parts.start()
    member: Any = parts.members.greet(HELLO.model_copy(update={"world_size": 1}), time.monotonic())
    for step in range(2):
        event = encode((SCALARS, step, 1, USER, {"x": 1.0}))
        parts.journal.append(Batch(0, LIFE, step, time.time_ns(), 1, encode_batch([event])))
    wait_until(lambda: member.durable == 2)
    parts.reducer.open()  # later than what it has to follow was committed
    sink: Any = parts.reducer.sink
    wait_until(lambda: bool(sink.rows))
    assert sink.rows[0] == (0, {"x": 1.0})
    parts.reducer.abandon(close=False)
    assert sink.closed.wait(20)


def test_who_is_told_that_a_batch_is_on_disk_can_wait_for_what_is_found_in_it(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = parts.decoding.put

    def at_leisure(committed: Any) -> None:
        threading.Event().wait(0.3)  # where ranks were told before, one asks meanwhile
        put(committed)

    monkeypatch.setattr(parts.decoding, "put", at_leisure)
    parts.start()
    with parts.members.lock:
        member: Any = parts.members.greet(HELLO, time.monotonic())
        event = encode((SCALARS, 0, 1, USER, {"x": "text"}))
        parts.journal.append(Batch(0, LIFE, 0, time.time_ns(), 1, encode_batch([event])))
    wait_until(lambda: member.durable == 1)
    assert parts.decoding.settled(10)
    assert member.view.notices == ["'x' is not logged: str 'text' is not a number; log numbers."]


def test_a_sign_that_comes_after_the_goodbye_does_not_change_the_final_counts(parts: Parts) -> None:
    """It was sent before, and went to another thread of the writer."""
    member: Any = parts.members.greet(HELLO, time.monotonic())
    final = Counts(logged=10, spooled=10)
    parts.members.leave(member, Goodbye(rank=0, life=LIFE, state="success", ended_ns=1, counts=final))
    parts.members.hear(Sign(0, LIFE, Counts(logged=10)), time.monotonic())
    assert member.account().counts == final
    assert member.state == "success"


def test_a_process_that_can_have_no_more_threads_opens_the_run_with_the_next_hello(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = threading.Thread.start, list[str]()

    def fails_once(thread: threading.Thread) -> None:
        if thread.name == "reducer" and "reducer" not in started:
            started.append("reducer")
            raise RuntimeError("can't start new thread")
        started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fails_once)
    with pytest.raises(RuntimeError):
        parts.reducer.open()
    parts.reducer.open()
    assert started == ["swanlab-sink", "reducer", "reducer"]
    parts.reducer.abandon(close=False)
    assert parts.reducer.sink.closed.wait(20)
