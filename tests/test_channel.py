"""The channel against the real writer, over a connection that this file can break."""

from __future__ import annotations

import itertools
import logging
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from swanlab_ray.actors.journal.records import Batch, Ended
from swanlab_ray.actors.journal.writing import Journal
from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.codec import decode_batch
from swanlab_ray.actors.wire.events import SCALARS, USER, Completions, Scalars, Stacks
from swanlab_ray.actors.wire.messages import WINDOW, Ack, Farewell, Goodbye, Hello, NumberedBatch, Sign
from swanlab_ray.observer import observer as observer_module
from swanlab_ray.observer.encoding import cells as cells_module
from swanlab_ray.observer.encoding.numbers import encode
from swanlab_ray.observer.job.doing import Pulse
from swanlab_ray.observer.job.identity import Identity
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.script.notices import logger, say_again
from swanlab_ray.observer.timing.spans import SpanLog
from swanlab_ray.observer.transport import batches as batches_module
from swanlab_ray.observer.transport import flusher as flusher_module
from swanlab_ray.observer.transport import queue as queue_module
from swanlab_ray.observer.transport import spool as spool_module
from swanlab_ray.observer.transport import tally as tally_module
from swanlab_ray.observer.transport import window as window_module
from swanlab_ray.observer.transport.channel import Channel
from swanlab_ray.observer.transport.link import Hopeless, LinkBroken, RunOver
from swanlab_ray.observer.transport.queue import SLOT_BYTES, EventQueue
from swanlab_ray.observer.transport.spool import Spool
from swanlab_ray.observer.transport.tally import Tally
from tests.conftest import wait_until
from tests.incarnations import Cluster, Link, mortal, rank, settings_for
from tests.shaky_link import ShakyLink


def test_events_arrive_once_and_in_order(link: ShakyLink, observer: Observer) -> None:
    for step in range(5000):
        observer.log({"x": step}, step)
    assert observer.finish()
    assert link.steps() == list(range(5000))
    statistics = observer.statistics()
    assert (statistics.logged, statistics.acknowledged, statistics.dropped) == (5000, 5000, {})


def test_a_lost_acknowledgement_is_sent_again_and_taken_once(link: ShakyLink, observer: Observer) -> None:
    link.lose_acks = 1
    for step in range(2000):
        observer.log({"x": step}, step)
    assert observer.finish()
    assert link.steps() == list(range(2000))
    assert observer.statistics().reconnections == 1


def test_what_is_logged_while_the_writer_is_away_arrives_later(
    link: ShakyLink, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    assert observer.wait_ready(10)
    link.down = True
    for step in range(1000):
        observer.log({"x": step}, step)
    assert not observer.flush(timeout=0.2)
    wait_until(lambda: "The writer is away (it is down)" in caplog.text)
    link.down = False
    assert observer.finish()
    assert link.steps() == list(range(1000))


def test_a_writer_that_forgot_everything_is_told_where_the_rank_stands(link: ShakyLink, observer: Observer) -> None:
    observer.log({"x": 0}, 0)
    assert observer.flush()
    link.next_seq, link.lose_acks = 0, 1
    observer.log({"x": 1}, 1)
    assert observer.finish()
    assert link.steps() == [0, 1]
    assert link.hellos[-1].next_seq == 1


def test_what_does_not_fit_in_memory_waits_on_disk_and_arrives_in_order(
    link: ShakyLink, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "UNSENT_BYTES", 10_000)
    monkeypatch.setattr(batches_module, "EVENTS_PER_BATCH", 100)
    assert observer.wait_ready(10)
    link.mute = True
    for step in range(20_000):
        observer.log({"x": step}, step)
    wait_until(lambda: observer.statistics().spooled > 15_000)
    spools = list(observer.settings.log_dir.rglob("spool-*.log"))
    assert len(spools) == 1
    link.mute = False
    assert observer.finish()
    assert link.steps() == list(range(20_000))
    statistics = observer.statistics()
    assert (statistics.acknowledged, statistics.spooled, statistics.dropped) == (20_000, 0, {})
    assert not spools[0].exists()


def test_without_room_anywhere_the_loss_is_counted(
    link: ShakyLink, observer: Observer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(batches_module, "UNSENT_BYTES", 10_000)
    monkeypatch.setattr(batches_module, "EVENTS_PER_BATCH", 100)
    monkeypatch.setattr(spool_module, "SPOOL_BYTES", 0)
    assert observer.wait_ready(10)
    link.mute = True
    for step in range(20_000):
        observer.log({"x": step}, step)
    wait_until(lambda: bool(observer.statistics().dropped))
    link.mute = False
    assert not observer.finish()
    assert "cannot be put on its disk either" in caplog.text
    assert f"Events of this rank are dropped: {tally_module.NO_ROOM}." in caplog.text
    statistics = observer.statistics()
    dropped = sum(statistics.dropped.values())
    assert set(statistics.dropped) == {tally_module.NO_ROOM}
    assert statistics.acknowledged + dropped == statistics.logged == 20_000
    assert len(link.steps()) == statistics.acknowledged
    assert link.steps() == sorted(set(link.steps()))
    assert link.steps()[-1] == 19_999  # the oldest go first
    assert link.goodbyes[0].counts.dropped == statistics.dropped


def test_what_cannot_be_sent_at_the_end_is_on_this_machine_s_disk(link: ShakyLink, observer: Observer) -> None:
    assert observer.wait_ready(10)
    link.mute = True
    for step in range(3000):
        observer.log({"x": step}, step)
    assert not observer.finish(timeout=0.5)
    assert observer.statistics().spooled == 3000
    (run,) = find_runs([observer.settings.log_dir])
    (spool,) = run.spools
    batches = [entry for entry in merged(run) if isinstance(entry, Batch)]
    assert spool.name.startswith("spool-0-")
    steps = [event.step for batch in batches for event in decode_batch(batch.data)[0] if isinstance(event, Scalars)]
    assert steps == list(range(3000))


def test_the_writer_may_have_no_room_for_a_while(link: ShakyLink, observer: Observer) -> None:
    assert observer.wait_ready(10)
    link.full = True
    for step in range(1000):
        observer.log({"x": step}, step)
    assert not observer.flush(timeout=0.5)
    link.full = False
    assert observer.finish()
    assert link.steps() == list(range(1000))
    assert observer.statistics().reconnections == 0


def test_the_training_thread_never_waits_for_room(link: ShakyLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "QUEUE_BYTES", 100 * SLOT_BYTES)
    link.down = True
    pulse = Pulse(SpanLog(print), int)
    channel = Channel(link, 0, "life", lambda seq: None, lambda: None, lambda run: None, pulse)  # type: ignore[arg-type, return-value]
    event = encode((SCALARS, 0, 0, USER, {"x": 1.0}))
    channel.start()
    for _ in range(1000):
        channel.put(event)
    statistics = channel.statistics()
    assert statistics.waiting + sum(statistics.dropped.values()) == statistics.logged == 1000
    channel.finish(lambda counted: None, timeout=0.1)  # type: ignore[arg-type, return-value]


def test_nothing_is_called_before_the_observer_is_there(link: ShakyLink, tmp_path: Path) -> None:
    """The first welcome may come at once, and its announcement asks the observer for the run id."""
    asked: list[str | None] = []
    pulse = Pulse(SpanLog(print), int)
    made: list[Channel] = []
    channel = Channel(
        link,
        0,
        "life",
        lambda seq: Hello(
            rank=0, world_size=1, local_rank=0, host="h", pid=1, pid_namespace="n", life="life", next_seq=seq
        ),
        lambda: asked.append(made[0].run_id),
        lambda run: Spool(settings_for(tmp_path), run, 0, "life"),
        pulse,
    )
    channel.put(encode((SCALARS, 0, 0, USER, {"x": 1.0})))
    assert not link.hellos
    made.append(channel)
    channel.start()
    assert channel.flush(20)
    assert (asked, channel.ready.is_set()) == (["shaky"], True)
    channel.finish(lambda counts: Goodbye(rank=0, life="life", state="success", ended_ns=1, counts=counts), timeout=5)


def test_finish_returns_in_its_deadline_when_nobody_answers(link: ShakyLink, observer: Observer) -> None:
    assert observer.wait_ready(10)
    link.mute = True
    observer.log({"x": 1})
    began = time.monotonic()
    assert not observer.finish(timeout=1)
    assert time.monotonic() - began < 5
    assert observer.statistics().spooled == 1
    (goodbye,) = link.goodbyes  # it hears that all the same, and of what is on the disk
    assert (goodbye.counts.logged, goodbye.counts.spooled) == (1, 1)


def test_a_goodbye_has_what_is_left_of_the_time(tmp_path: Path) -> None:
    """Its answer comes once the writer has looked at what was sent before."""
    waits: list[float] = []

    class Measuring(ShakyLink):
        def goodbye(self, goodbye: Goodbye, wait: float) -> Farewell:
            waits.append(wait)
            return super().goodbye(goodbye, wait)

    observer = Observer(ObserverSettings(project="p", log_dir=tmp_path), Identity(0, 1, 0, 1), Measuring())
    assert observer.wait_ready(10)
    assert observer.finish(timeout=120)
    (wait,) = waits
    assert 60 < wait <= 120


def test_a_second_finish_leaves_the_first_one_no_more_time_than_itself(link: ShakyLink, observer: Observer) -> None:
    """A signal came while the script's own finish() was waiting: the flusher itself puts aside and says goodbye."""
    assert observer.wait_ready(10)
    link.mute = True
    observer.log({"x": 1})
    first = threading.Thread(target=observer.finish, kwargs={"timeout": 600})
    first.start()
    wait_until(lambda: observer._channel._last_words.due, 10, "the end has begun")
    began = time.monotonic()
    assert not observer.finish(timeout=2)
    first.join(20)
    assert time.monotonic() - began < 10
    assert [goodbye.counts.spooled for goodbye in link.goodbyes] == [1]


def test_a_call_takes_no_longer_than_the_end_may(tmp_path: Path) -> None:
    """Once the training has ended; until then a link decides for itself."""

    class Patient(ShakyLink):
        deadline = math.inf

        def acknowledged(self, reference: Any, wait: float) -> Ack | None:
            wait_until(lambda: time.monotonic() >= self.deadline)
            raise LinkBroken("no answer by the deadline")

    link = Patient()
    observer = Observer(ObserverSettings(project="p", log_dir=tmp_path), Identity(0, 1, 0, 1), link)
    observer.log({"x": 1}, 0)
    wait_until(lambda: bool(link.taken))
    assert not observer.finish(timeout=2)
    assert observer._channel.last_error == "no answer by the deadline"
    assert observer.statistics().spooled == 1


def test_a_rank_that_can_never_reach_the_writer_ends_at_once(tmp_path: Path) -> None:
    class Never(ShakyLink):
        def open(self, hello: Hello) -> Ack:
            raise Hopeless("This process has no way to Ray.")

    observer = Observer(ObserverSettings(project="p", log_dir=tmp_path), Identity(0, 1, 0, 1), Never())
    observer.log({"x": 1}, 0)
    began = time.monotonic()
    assert not observer.finish(timeout=300)
    assert time.monotonic() - began < 15
    assert observer.statistics().spooled == 1


def test_a_rank_whose_run_was_over_goes_on_with_the_next_writer(tmp_path: Path) -> None:
    """It counted as lost for a while, and the run had ended without it."""

    class Over(ShakyLink):
        ended = True

        def ingest(self, sign: Sign, batch: NumberedBatch | None) -> Any:
            if batch is not None and self.ended:
                self.ended = False
                raise RunOver("run r has ended")
            return super().ingest(sign, batch)

    link = Over()
    observer = Observer(ObserverSettings(project="p", log_dir=tmp_path), Identity(0, 1, 0, 1), link)
    observer.log({"x": 1}, 0)
    assert observer.flush(30)
    observer.log({"x": 1}, 1)
    assert observer.finish()
    assert link.steps() == [0, 1]
    assert len(link.hellos) == 2


def test_at_the_end_a_writer_that_is_away_is_asked_again_soon(
    link: ShakyLink, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However seldom it is before, there is not much time left."""
    monkeypatch.setattr(flusher_module, "RETRY_S", (0.05, 600.0))
    assert observer.wait_ready(10)
    link.down = True
    observer.log({"x": 1}, 0)
    ending = threading.Thread(target=observer.finish)
    ending.start()
    wait_until(lambda: observer._channel._last_words.due and observer._channel.last_error == "it is down")
    link.down = False
    ending.join(30)
    assert link.steps() == [0]
    assert len(link.goodbyes) == 1


def test_a_rank_that_has_everything_on_disk_already_keeps_it_for_good(
    link: ShakyLink, observer: Observer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With its end behind it, and says so, though nothing is left in memory to be put aside."""
    monkeypatch.setattr(batches_module, "UNSENT_BYTES", 0)
    link.down = True
    observer.log({"x": 1}, 0)
    wait_until(lambda: observer.statistics().spooled == 1)
    assert not observer.finish(timeout=1)
    assert caplog.text.count("1 event of this rank did not reach the writer") == 1
    (run,) = find_runs([observer.settings.log_dir])
    assert [type(entry) for entry in merged(run)][-1] is Ended


def test_what_was_put_aside_is_told_once(link: ShakyLink, observer: Observer, caplog: pytest.LogCaptureFixture) -> None:
    assert observer.wait_ready(10)
    link.mute = True
    observer.log({"x": 1}, 0)
    assert not observer.finish(timeout=1)
    assert caplog.text.count("1 event of this rank did not reach the writer") == 1


def test_what_can_be_neither_sent_nor_put_on_disk_is_told_and_why(
    link: ShakyLink, observer: Observer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert observer.wait_ready(10)
    link.mute = True
    monkeypatch.setattr(spool_module, "SPOOL_BYTES", 0)
    for step in range(3):
        observer.log({"x": 1}, step)
    assert not observer.finish(timeout=1)
    (told,) = [record.message for record in caplog.records if "Lost" in record.message]
    assert "3 events of this rank" in told
    assert "0 are the most" in told
    assert observer.statistics().dropped == link.goodbyes[0].counts.dropped == {tally_module.UNSENT: 3}


def test_a_connection_that_does_not_close_makes_nothing_untrue(tmp_path: Path) -> None:
    closed = threading.Event()

    class Closing(ShakyLink):
        def close(self, over: bool) -> None:
            closed.wait(60)

    observer = Observer(ObserverSettings(project="p", log_dir=tmp_path), Identity(0, 1, 0, 1), Closing())
    observer.log({"x": 1}, 0)
    assert observer.flush()
    assert observer.finish(timeout=1)
    closed.set()


def test_steps_count_up_where_none_is_given(link: ShakyLink, observer: Observer) -> None:
    observer.log({"x": 0})
    observer.log({"x": 1})
    observer.log({"x": 2}, step=10)
    observer.log({"x": 3})
    assert observer.finish()
    assert link.steps() == [0, 1, 10, 11]


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (-1, "step -1 is negative: pass an int of 0 or more, or leave it out."),
        (1.5, "step 1.5 is not a whole number: pass an int of 0 or more, or leave it out."),
        ("3", "step '3' is not a whole number: pass an int of 0 or more, or leave it out."),
    ],
)
def test_a_wrong_step_warns_once_and_raises_when_strict(
    link: ShakyLink, tmp_path: Path, caplog: pytest.LogCaptureFixture, step: Any, sentence: str
) -> None:
    relaxed = Observer(ObserverSettings(project="p", log_dir=tmp_path), Identity(0, 1, 0, 1), link)
    relaxed.log({"x": 1}, step)
    relaxed.log({"x": 1}, -7)
    relaxed.log({"x": 1}, -8)
    said = [record.message for record in caplog.records if "step" in record.message]
    other = "step -7 is negative: pass an int of 0 or more, or leave it out."
    assert said == ([sentence] if step == -1 else [sentence, other])
    assert relaxed.finish()
    assert not link.taken
    assert link.goodbyes[0].counts.refused == 3
    strict = Observer(ObserverSettings(project="p", log_dir=tmp_path, strict=True), Identity(0, 1, 0, 1), ShakyLink())
    with pytest.raises(ValueError, match="step"):
        strict.log({"x": 1}, step)
    strict.finish()


def test_nothing_that_is_logged_raises(link: ShakyLink, observer: Observer) -> None:
    """Numbers beyond 64 bits, names that cannot be encoded, things that raise when they are read."""

    class Nasty:
        def __float__(self) -> float:
            raise RuntimeError("no")

    observer.log({"x": 1, "huge": 2**80, "\ud800": 1, "nasty": Nasty()}, 0)
    observer.log({"x": 1}, 2**70)
    observer.log(None)  # type: ignore[arg-type]
    observer.log({"x": 2}, 1)
    observer.config({"bad": {1: Nasty()}, "huge": 2**80})
    observer.progress(2**80)
    assert observer.finish()
    assert [event.values for event in link.taken[:2]] == [{"x": 1.0, "huge": float(2**80)}, {"x": 2.0}]


def test_numpy_steps_are_steps(link: ShakyLink, observer: Observer) -> None:
    import numpy as np

    observer.log({"x": 1}, np.int64(4))
    assert observer.finish()
    assert link.steps() == [4]


def test_a_rejected_value_warns_once_by_name(
    link: ShakyLink, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        observer.log({"x": 1, "thing": object()})
    assert observer.finish()
    warnings = [record.message for record in caplog.records if "thing" in record.message]
    assert warnings == ["'thing' is not logged: object is not a number; log numbers."]
    assert [event.values for event in link.taken] == [{"x": 1.0}] * 3


def test_a_value_on_a_gpu_is_read_by_the_flusher_in_order(
    link: ShakyLink, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU here: a value that says it is on one, and whose copy is ready some time later."""
    import swanlab_ray.observer.encoding.numbers as values

    class OnGpu:
        is_cuda = True

        def reshape(self, shape: tuple[()]) -> OnGpu:
            return self

        def numel(self) -> int:
            return 1

        def __float__(self) -> float:
            raise AssertionError("reading it would wait for the GPU")

    arrived = threading.Event()
    broken = ["x"]

    class Copy(values.HostCopy):
        def __init__(self, tensor: Any) -> None: ...

        def ready(self) -> bool:
            return arrived.is_set()

        def read(self) -> float:
            if broken:
                raise RuntimeError(f"device-side assert {broken.pop()}")
            return 2.5

    monkeypatch.setattr(values, "HostCopy", Copy)
    monkeypatch.setattr(observer_module, "HostCopy", Copy)
    monkeypatch.setattr(cells_module, "HostCopy", Copy)
    observer.log({"before": 1}, 0)
    observer.log({"lost": OnGpu()}, 1)
    observer.log({"x": OnGpu(), "y": 1}, 2)
    observer.log_completions([{"prompt": "p", "reward": OnGpu()}], 2)
    observer.log({"after": 1}, 3)
    wait_until(lambda: link.steps() == [0])
    assert observer.statistics().waiting == 4
    arrived.set()
    observer.finish()
    (rows,) = [event for event in link.taken if isinstance(event, Completions)]
    assert rows.columns == {"prompt": ["p"], "reward": [2.5]}
    scalars = [event.values for event in link.taken if isinstance(event, Scalars)]
    assert scalars == [{"before": 1.0}, {"x": 2.5, "y": 1.0}, {"after": 1.0}]
    assert observer.statistics().dropped == {
        tally_module.UNREAD: 1
    }  # the GPU failed while it was read, and the rest went on


def test_secrets_in_a_configuration_are_masked(link: ShakyLink, observer: Observer) -> None:
    observer.config({"hub_token": "s3cret", "nested": {"api_key": ["s3cret"]}, "secrets": {"a": "s3cret"}})
    observer.config({"token": "s3cret", "eos_token": "</s>", "n": 1})
    assert observer.finish()
    assert [event.values for event in link.taken] == [
        {"hub_token": "***", "nested": {"api_key": "***"}, "secrets": "***"},
        {"token": "***", "eos_token": "</s>", "n": 1},
    ]


def test_signs_of_life_carry_the_counts(link: ShakyLink, observer: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module, "BEAT_S", 0.01)
    observer.log({"x": 1})
    wait_until(lambda: bool(link.signs) and link.signs[-1][0].counted.logged == 1)
    assert next(itertools.islice(link.signs, 1))[0].rank == 0


def test_a_rank_that_sends_batches_gives_no_other_sign_of_life(
    link: ShakyLink, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_module, "BEAT_S", 30.0)
    for step in range(20):
        observer.log({"x": step}, step)
        wait_until(lambda: link.steps()[-1:] == [step])  # noqa: B023
    with_batches = [with_batch for _, with_batch in link.signs]
    assert with_batches[with_batches.index(True) :] == [True] * 20
    sign, _ = link.signs[-1]
    assert (sign.counted.logged, sign.doing.step if sign.doing else None) == (20, 19)


def test_a_rank_is_heard_while_the_writer_s_disk_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its window is full, so no batch tells that it is there."""
    mortal(monkeypatch)
    monkeypatch.setattr(window_module, "BEAT_S", 0.02)
    monkeypatch.setattr(batches_module, "EVENTS_PER_BATCH", 10)
    stuck = threading.Event()
    real = Journal._commit
    monkeypatch.setattr(Journal, "_commit", lambda self, group: (stuck.wait(), real(self, group))[1])
    cluster = Cluster(settings_for(tmp_path))
    observer = rank(cluster, Link(cluster))
    assert observer.wait_ready(10)
    for step in range(100):
        observer.log({"x": step}, step)
    member = cluster.find()._members.ranks[0]
    wait_until(lambda: member.next_seq == WINDOW)
    for step in range(100, 103):
        observer.log({"x": step}, step)
        wait_until(lambda: member.counted.logged == step + 1)  # noqa: B023
    assert (member.next_seq, member.durable, observer.statistics().acknowledged) == (WINDOW, 0, 0)
    stuck.set()
    assert observer.finish()


class SlowLink(ShakyLink):
    """Its connection takes until it is told: a cluster is being started."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()
        self.up = threading.Event()
        self.closed = threading.Event()

    def open(self, hello: Hello) -> Ack:
        self.asked.set()
        self.up.wait(60)
        return super().open(hello)

    def close(self, over: bool) -> None:
        self.closed.set()


def test_what_is_logged_while_a_cluster_starts_goes_to_the_spool_and_arrives_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the queue takes, before the ranks have even agreed on a run id."""
    monkeypatch.setattr(queue_module, "QUEUE_BYTES", 5_000 * SLOT_BYTES)
    monkeypatch.setattr(batches_module, "UNSENT_BYTES", 50_000)
    link = SlowLink()
    link.run_id = None
    observer = Observer(ObserverSettings(project="p", log_dir=tmp_path), Identity(0, 1, 0, 1), link)
    for step in range(20_000):
        observer.log({"x": step}, step)
        if step % 2_000 == 0:
            wait_until(lambda: len(observer._queue) < 3_000)
    wait_until(lambda: observer.statistics().spooled > 5_000)
    assert observer.statistics().dropped == {}
    link.run_id = "shaky"
    link.up.set()
    assert observer.finish()
    assert link.steps() == list(range(20_000))
    assert observer.statistics().acknowledged == 20_000
    assert not list(tmp_path.rglob("spool-*.log"))


def test_an_end_while_a_cluster_starts_is_within_its_time_and_leaves_no_connection(tmp_path: Path) -> None:
    link = SlowLink()
    observer = Observer(ObserverSettings(project="p", log_dir=tmp_path), Identity(0, 1, 0, 1), link)
    observer.log({"x": 1}, 0)
    began = time.monotonic()
    assert not observer.finish(timeout=1)
    assert time.monotonic() - began < 4
    assert observer.statistics().spooled == 1
    assert not link.closed.is_set()
    link.up.set()
    assert link.closed.wait(10)  # by the thread that opened it, since nobody waits any more


def test_the_threads_that_send_are_not_among_those_of_the_training(tmp_path: Path) -> None:
    """Where a rank stands still, it shows those of the script only."""
    link = SlowLink()
    observer = Observer(ObserverSettings(project="p", log_dir=tmp_path), Identity(0, 1, 0, 1), link)
    assert link.asked.wait(20)
    ((stacks,), _) = decode_batch(b"\x91" + observer._channel._flusher._pulse.stacks())
    assert isinstance(stacks, Stacks)
    assert not [frame for frames in stacks.frames for frame in frames if "SlowLink" in frame]
    link.up.set()
    assert observer.finish()


def test_an_end_without_any_time_still_puts_on_disk_what_there_is(tmp_path: Path) -> None:
    """The flusher is given a moment to let go."""
    observer = Observer(ObserverSettings(project="p", log_dir=tmp_path), Identity(0, 1, 0, 1), SlowLink())
    with observer._channel._ownership.lock:  # the flusher is at work
        observer.log({"x": 1}, 0)
        ending = threading.Thread(target=observer.finish, kwargs={"timeout": 0})
        ending.start()
        wait_until(lambda: observer._channel._last_words.due, 10, "the end has begun")
    ending.join()
    assert observer.statistics().spooled == 1


def test_what_ends_other_threads_does_not_end_the_one_that_sends(tmp_path: Path) -> None:
    ends = [SystemExit(1), KeyboardInterrupt()]

    class Ending(ShakyLink):
        def open(self, hello: Hello) -> Ack:
            if ends:
                raise ends.pop()
            return super().open(hello)

    link = Ending()
    observer = Observer(ObserverSettings(project="p", log_dir=tmp_path), Identity(0, 1, 0, 1), link)
    observer.log({"x": 1}, 0)
    assert observer.wait_ready(30)
    assert observer.finish()
    assert link.steps() == [0]


def test_a_driver_that_hangs_costs_no_event(link: ShakyLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank tells its GPU's name when it says hello, and where the GPU has failed nobody answers that."""
    over = threading.Event()
    monkeypatch.setattr(observer_module, "gpu_name", lambda local_rank: over.wait(60) and None)
    observer = Observer(ObserverSettings(project="p", log_dir=tmp_path), Identity(0, 1, 0, 1), link)
    for step in range(100):
        observer.log({"x": step}, step)
    began = time.monotonic()
    assert not observer.finish(timeout=3)
    assert time.monotonic() - began < 10
    over.set()
    statistics = observer.statistics()
    assert (statistics.logged, statistics.spooled, statistics.dropped) == (100, 100, {})


def test_without_threads_a_rank_spools_what_it_has_logged(
    link: ShakyLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    settings = ObserverSettings(project="p", log_dir=tmp_path, node_interval=1)
    observer = Observer(settings, Identity(0, 1, 0, 1), link)
    for step in range(100):
        observer.log({"x": step}, step)
    assert not observer.finish(timeout=1)
    assert observer.statistics().spooled == 100
    assert "this process can have no more threads" in caplog.text


def test_without_descriptors_a_rank_reports_all_the_same(
    link: ShakyLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_more(*args: Any, **kwargs: Any) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("socket.socketpair", no_more)
    observer = Observer(ObserverSettings(project="p", log_dir=tmp_path), Identity(0, 1, 0, 1), link)
    observer.log({"x": 1}, 0)
    assert observer.finish()
    assert link.steps() == [0]
    assert "Too many open files" in caplog.text


def test_large_events_are_bounded_by_their_bytes(
    link: ShakyLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the flusher stands still."""
    monkeypatch.setattr(queue_module, "QUEUE_BYTES", 1_000_000)
    settings = ObserverSettings(project="p", log_dir=tmp_path)
    observer = Observer(settings, Identity(0, 1, 0, 1), link)
    with observer._channel._ownership.lock:  # what the flusher holds while it is at work
        names = {f"a long name {number}": 1.0 for number in range(3000)}
        for step in range(100):
            observer.log(names, step)
        assert sum(len(event) for event in observer._queue if isinstance(event, bytes)) < 1_100_000
        dropped = observer.statistics().dropped
    assert 50 < dropped[tally_module.OVERFLOW] < 100
    assert not observer.finish()
    statistics = observer.statistics()
    assert statistics.logged == 100 == statistics.acknowledged + dropped[tally_module.OVERFLOW]
    assert link.steps()[-1] == 99


def test_a_forked_child_waits_for_nothing(link: ShakyLink, observer: Observer) -> None:
    """Whatever lock the flusher held at the fork; and what the child does is not the parent's."""
    assert observer.wait_ready(10)
    observer.log({"x": 1}, 0)
    assert observer.flush()
    channel = observer._channel
    with channel._ownership.lock, channel.queue.counting:
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            observer._forked()
            observer.log({"x": 2, "bad": None}, 1)
            observer.log({"x": 1j}, 2)
            fine = observer.flush() and observer.finish() and observer.statistics().logged == 0
            os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert observer.finish()
    assert link.steps() == [0]


def test_two_threads_may_flush_at_once(link: ShakyLink, observer: Observer) -> None:
    observer.log({"x": 1}, 0)
    done: list[bool] = []
    threads = [threading.Thread(target=lambda: done.append(observer.flush())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [True] * 8
    assert observer._channel._flusher._hurried == 0


def test_a_signal_handler_may_ask_whatever_it_interrupts(link: ShakyLink, observer: Observer) -> None:
    """It runs on the thread that it interrupts, which may be counting just then."""
    channel, over = observer._channel, threading.Event()

    def interrupted() -> None:
        with channel.queue.counting:
            observer.log({f"a long name {number}": 1.0 for number in range(3000)}, 0)
            observer.log({"x": 1j}, 1)
            observer.flush(timeout=0)
            observer.finish(timeout=1.0)
        over.set()

    threading.Thread(target=interrupted, daemon=True).start()
    assert over.wait(20)


def test_what_comes_too_late_is_told_while_nobody_waits() -> None:
    """A script's logging handler may ask another thread for the counts, or log to the run."""
    say_again()
    queue = EventQueue()
    answers: list[int] = []

    class Asks(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            asking = threading.Thread(target=lambda: answers.append(Tally(queue).statistics().logged), daemon=True)
            asking.start()
            asking.join(10)

    asks = Asks()
    logger.addHandler(asks)
    try:
        queue.append(b"x")
        queue.append(b"x")
        queue.refuse_rest()
    finally:
        logger.removeHandler(asks)
    assert answers == [2]


@pytest.mark.parametrize("timeout", [math.inf, 1e300])
def test_whoever_waits_may_wait_for_ever(link: ShakyLink, observer: Observer, timeout: float) -> None:
    observer.log({"x": 1}, 0)
    assert observer.wait_ready(timeout)
    assert observer.flush(timeout)
    assert observer.finish(timeout=timeout)
    assert len(link.goodbyes) == 1


def test_a_thread_that_logs_on_while_a_run_ends_holds_that_up_not(link: ShakyLink, observer: Observer) -> None:
    """What it logs from finish() on comes too late, and is counted; what it had logged before arrives."""
    stop = threading.Event()

    def watch_gpu() -> None:
        step = 0
        while not stop.is_set():
            observer.log({"gpu": 1.0}, step)
            step += 1
            stop.wait(0.0005)

    watching = threading.Thread(target=watch_gpu)
    watching.start()
    wait_until(lambda: len(link.taken) > 20)
    began = time.monotonic()
    assert observer.finish(timeout=60)
    assert time.monotonic() - began < 30
    wait_until(lambda: bool(observer.statistics().dropped))
    stop.set()
    watching.join()
    statistics = observer.statistics()
    late = statistics.dropped[tally_module.LATE]
    assert set(statistics.dropped) == {tally_module.LATE}
    assert (statistics.waiting, statistics.spooled) == (0, 0)
    assert statistics.logged == statistics.acknowledged + late
    assert link.steps() == list(range(statistics.acknowledged))
    assert link.goodbyes[0].counts.dropped.get(tally_module.LATE, 0) <= late
