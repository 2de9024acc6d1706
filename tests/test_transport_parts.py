"""The parts of a rank's channel, each by itself: the queue, the tally, the window, and who owns what."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swanlab_ray.actors.wire.messages import WINDOW, Ack, Counts, NumberedBatch, Sign
from swanlab_ray.observer.encoding.numbers import Deferred
from swanlab_ray.observer.transport import batches as batches_module
from swanlab_ray.observer.transport import queue as queue_module
from swanlab_ray.observer.transport import window as window_module
from swanlab_ray.observer.transport.batches import Batches
from swanlab_ray.observer.transport.connection import Opening
from swanlab_ray.observer.transport.last_words import Ownership, Rescued
from swanlab_ray.observer.transport.link import LinkBroken
from swanlab_ray.observer.transport.queue import SLOT_BYTES, EventQueue
from swanlab_ray.observer.transport.spool import Spool
from swanlab_ray.observer.transport.tally import OVERFLOW, UNREAD, Tally
from swanlab_ray.observer.transport.window import Window
from tests.incarnations import settings_for

SIZES = st.one_of(st.integers(0, 100), st.integers(SLOT_BYTES - 2, SLOT_BYTES + 2), st.integers(0, 12 * SLOT_BYTES))


def append(queue: EventQueue, event: bytes) -> None:
    """As ``Observer.log`` does."""
    if len(queue) < queue.room and len(event) < SLOT_BYTES:
        queue.append(event)
    else:
        queue.put(event)


@settings(print_blob=True, deadline=None)
@given(st.lists(st.one_of(SIZES, st.sampled_from(["take", "take all"]))))
def test_the_queue_holds_what_its_bytes_allow(does: list[int | str]) -> None:
    """However large its events are; and each is taken out or counted, the oldest first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue_module, "QUEUE_BYTES", 10 * SLOT_BYTES)
        patch.setattr(queue_module, "TAKEN_AT_ONCE", 3)
        queue = EventQueue()
        put: list[bytes] = []
        taken = 0
        for number, do in enumerate(does):
            if isinstance(do, int):
                put.append(bytes([number % 256]) * do)
                append(queue, put[-1])
            else:
                taken += len(queue.take()) if do == "take" else queue.take_all()
            held = sum(max(SLOT_BYTES, len(event)) for event in queue if isinstance(event, bytes))
            assert held <= 10 * SLOT_BYTES or len(queue) == 1
        assert taken + queue.overflowed + len(queue) == len(put)
        rest = list(queue)
        assert rest == put[len(put) - len(rest) :]
        while queue:
            queue.take()
        assert queue.room == 10


def test_an_event_that_is_still_to_be_encoded_keeps_its_place() -> None:
    queue, lost = EventQueue(), []
    deferred = Deferred([], bytes, lambda: lost.append("lost"))
    for event in (b"a", deferred, b"b"):
        queue.put(event)
    assert queue.take() == [b"a"]
    assert queue.take() == []
    assert queue.first_deferred() is deferred
    assert queue.remove_first(deferred)
    assert not queue.remove_first(deferred)
    assert queue.take() == [b"b"]


def test_an_event_that_is_dropped_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "QUEUE_BYTES", SLOT_BYTES)
    queue, lost = EventQueue(), []
    queue.put(Deferred([], bytes, lambda: lost.append("lost")))
    queue.put(b"a")
    assert (lost, queue.overflowed, list(queue)) == (["lost"], 1, [b"a"])


def test_the_counts_add_up_whenever_somebody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While two threads log more than there is room for, and the flusher takes, spools and drops."""
    monkeypatch.setattr(queue_module, "QUEUE_BYTES", 50 * SLOT_BYTES)
    monkeypatch.setattr(batches_module, "UNSENT_BYTES", 1_000)
    monkeypatch.setattr(batches_module, "EVENTS_PER_BATCH", 7)
    queue = EventQueue()
    tally = Tally(queue)
    batches = Batches(queue, tally, lambda: Spool(settings_for(tmp_path), "r", 0, "life"), nullcontext)
    stop, logged = threading.Event(), [0, 0]

    def log(number: int) -> None:
        while not stop.is_set():
            append(queue, b"event" * (1 if logged[number] % 5 else 1000))
            logged[number] += 1

    def flush() -> None:
        while not stop.is_set():
            batches.collect([])
            sent = batches.next()
            if sent is not None:
                batches.acknowledged(sent)

    threads = [threading.Thread(target=log, args=(number,)) for number in range(2)]
    threads.append(threading.Thread(target=flush))
    for thread in threads:
        thread.start()
    before, interval = 0, sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(10_000):
            now = tally.statistics()
            assert now.logged == now.acknowledged + now.spooled + now.waiting + sum(now.dropped.values())
            assert now.logged >= before
            assert min(now.acknowledged, now.spooled, now.waiting) >= 0
            before = now.logged
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        for thread in threads:
            thread.join()
    left = tally.statistics()
    assert (left.logged, left.dropped[OVERFLOW]) == (sum(logged), queue.overflowed)
    assert tally.drop_waiting("the end") == left.waiting
    assert tally.statistics().waiting == 0


def test_what_cannot_be_read_is_counted_and_what_follows_goes_on(tmp_path: Path) -> None:
    class Failing(Deferred):
        def ready(self) -> bool:
            raise RuntimeError("device-side assert")

    queue = EventQueue()
    tally = Tally(queue)
    batches = Batches(queue, tally, lambda: Spool(settings_for(tmp_path), "r", 0, "life"), nullcontext)
    for event in (b"a", Failing([], bytes), Deferred([], lambda: b"b"), b"c"):
        queue.put(event)
    batches.collect([])
    sent = batches.next()
    assert sent is not None
    assert sent.batch.events == 3
    assert tally.statistics().dropped == {UNREAD: 1}


def test_what_a_rank_tells_of_itself_is_one_event_more(tmp_path: Path) -> None:
    """As the stacks of a rank that stands still, which do not go through the queue."""
    queue = EventQueue()
    tally = Tally(queue)
    batches = Batches(queue, tally, lambda: Spool(settings_for(tmp_path), "r", 0, "life"), nullcontext)
    batches.report(b"a")
    assert (tally.statistics().logged, tally.statistics().waiting) == (1, 1)
    sent = batches.next()
    assert sent is not None
    batches.acknowledged(sent)
    statistics = tally.statistics()
    assert (statistics.logged, statistics.acknowledged, statistics.waiting) == (1, 1, 0)


@pytest.mark.parametrize("first", ["open", "abandoned"])
def test_a_connection_that_nobody_waits_for_is_closed(first: str) -> None:
    """Whether it is open by then or is so later, and once."""
    may_open, closed = threading.Event(), threading.Semaphore(0)

    def open_it() -> Ack:
        may_open.wait(20)
        return ack(0, 0)

    opening = Opening(open_it, closed.release)
    if first == "open":
        may_open.set()
        assert opening.wait(20)
    opening.abandon()
    may_open.set()
    assert closed.acquire(timeout=20)
    assert opening.wait(20)
    assert not closed.acquire(blocking=False)


class Wire:
    """Ends at a writer that answers when it is told."""

    run_id: str | None = "r"
    deadline = 0.0

    def __init__(self) -> None:
        self.sent: list[int | None] = []
        self.answers: list[Ack] = []

    def ingest(self, sign: Sign, batch: NumberedBatch | None) -> Any:
        self.sent.append(batch.seq if batch else None)

    def acknowledged(self, reference: Any, wait: float) -> Ack | None:
        return self.answers.pop(0) if self.answers else None

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(name)


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def parts(wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[EventQueue, Batches, Window]]:
    """Ten events in batches of one."""
    monkeypatch.setattr(batches_module, "EVENTS_PER_BATCH", 1)
    queue = EventQueue()
    tally = Tally(queue)
    batches = Batches(queue, tally, lambda: Spool(settings_for(tmp_path), "r", 0, "life"), nullcontext)
    window = Window(wire, batches, lambda: Sign(0, "life", Counts()), nullcontext)
    queue.extend(bytes([n]) for n in range(10))
    batches.collect(window.under_way)
    yield queue, batches, window
    statistics = tally.statistics()
    assert statistics.logged == 10 == statistics.acknowledged + statistics.spooled + statistics.waiting


def hear(window: Window) -> None:
    for answer in window.answers(0.0):
        window.heed(answer)


def ack(durable: int, next_seq: int) -> Ack:
    return Ack(durable, next_seq, 0.1, [])


def test_no_more_than_the_window_is_under_way(wire: Wire, parts: tuple[EventQueue, Batches, Window]) -> None:
    _, _, window = parts
    window.send()
    window.send()
    assert wire.sent == [0, 1, 2, 3]
    assert window.asking
    wire.answers = [ack(0, 1), ack(0, 2), ack(0, 3), ack(2, 4)]
    hear(window)
    assert (window.first, window.all_taken, window.asking) == (2, True, False)
    window.send()
    assert wire.sent == [0, 1, 2, 3, 4, 5]


def test_what_the_writer_does_not_take_is_sent_again_from_there(
    wire: Wire, parts: tuple[EventQueue, Batches, Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Go-back-N: it had room for one of four."""
    _, _, window = parts
    window.send()
    wire.answers = [ack(0, 1)] * 4
    hear(window)
    assert not window.all_taken
    window.send()  # not at once: it has just had no room
    assert wire.sent == [0, 1, 2, 3]
    window.held_until = 0.0
    window.send()
    assert wire.sent == [0, 1, 2, 3, 1, 2, 3]


def test_a_writer_that_was_started_again_gets_what_it_does_not_have(
    wire: Wire, parts: tuple[EventQueue, Batches, Window]
) -> None:
    _, _, window = parts
    window.send()
    wire.answers = [ack(0, n + 1) for n in range(WINDOW)]
    hear(window)
    window.broken()
    assert window.heed(ack(1, 2))
    assert not window.heed(ack(1, 2))  # nothing new is on the disk
    window.welcomed(ack(1, 2))
    assert window.first == 1
    window.send()
    assert wire.sent[WINDOW:] == [2, 3, 4]  # 1 is on its way to the disk


def test_one_sign_of_life_at_a_time_and_none_where_a_batch_was(
    wire: Wire, parts: tuple[EventQueue, Batches, Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, window = parts
    window.send()
    window.give_sign(now=False)
    assert wire.sent == [0, 1, 2, 3]
    monkeypatch.setattr(window_module, "BEAT_S", 0.0)
    window.give_sign(now=False)
    window.give_sign(now=True)
    assert wire.sent == [0, 1, 2, 3, None]
    wire.answers = [ack(0, 1), ack(0, 2), ack(0, 3), ack(0, 4), ack(4, 4)]
    hear(window)
    window.give_sign(now=True)
    assert (wire.sent, window.first) == ([0, 1, 2, 3, None, None], 4)


def test_a_writer_that_does_not_answer_is_not_there(
    wire: Wire, parts: tuple[EventQueue, Batches, Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, window = parts
    window.send()
    hear(window)
    monkeypatch.setattr(window_module, "CALL_DEADLINE_S", -1.0)
    with pytest.raises(LinkBroken, match="not answered"):
        hear(window)


def test_batches_go_through_the_spool_in_their_order(
    wire: Wire, parts: tuple[EventQueue, Batches, Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those under way first, which are not sent from there again."""
    _, batches, window = parts
    window.send()
    monkeypatch.setattr(batches_module, "UNSENT_BYTES", 2)
    batches.collect(window.under_way)
    assert [sent.spooled for sent in window.under_way] == [True] * WINDOW
    for number in range(1, 11):
        wire.answers = [ack(number, number)]
        hear(window)
        window.send()
    assert wire.sent == list(range(10))
    assert (batches.empty, window.first) == (True, 10)
    assert batches.spool is not None
    assert batches.spool.path is None  # nothing is left of it


def test_whoever_takes_over_finds_nobody_at_work_and_keeps_it() -> None:
    ownership = Ownership()
    is_away, come_back, over = threading.Event(), threading.Event(), threading.Event()
    did: list[str] = []

    def flush() -> None:
        with ownership.of_flusher():
            with ownership.away():
                is_away.set()
                come_back.wait(20)
            did.append("went on")
        over.set()

    with ownership.of_flusher(), ownership.instead(0.01) as owner:
        assert not owner  # the flusher is at work
    threading.Thread(target=flush, daemon=True).start()
    assert is_away.wait(20)
    with ownership.instead(20) as owner:
        assert owner
        with ownership.away():  # makes room for nobody
            assert ownership.lock.locked()
        ownership.lost = True
        come_back.set()
    assert over.wait(20)
    assert did == []


def test_who_was_relieved_does_nothing_more() -> None:
    """Whatever went wrong while it was away."""
    ownership = Ownership()
    with ownership.of_flusher():
        ownership.lost = True
        with pytest.raises(Rescued), ownership.away():
            raise OSError("the disk is full")
