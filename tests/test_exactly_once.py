"""Ranks, channels, spools and writers together, with everything that can go wrong between them: what was logged is in
the files once, or counted as dropped."""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from swanlab_ray.actors.journal.writing import Journal
from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.wire.messages import Counts, Fenced, Sign
from swanlab_ray.actors.writer import actor as writer_module
from swanlab_ray.actors.writer.actor import Writer
from swanlab_ray.observer.history import archive
from swanlab_ray.observer.job.identity import Identity
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.transport import batches as batches_module
from swanlab_ray.observer.transport import channel as channel_module
from swanlab_ray.observer.transport import flusher as flusher_module
from tests.conftest import wait_until
from tests.incarnations import Cluster, Link, logged_in, mortal, settings_for

# The threads of a killed writer end.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

RANKS = 2


class Job(RuleBasedStateMachine):
    """Two ranks log while the writer is killed, cut off, or loses answers."""

    @initialize()
    def start(self) -> None:
        self.patch = pytest.MonkeyPatch()
        mortal(self.patch)
        self.patch.setattr(batches_module, "UNSENT_BYTES", 2_000)
        self.patch.setattr(batches_module, "EVENTS_PER_BATCH", 7)
        self.patch.setattr(flusher_module, "RETRY_S", (0.005, 0.02))
        self.patch.setattr(flusher_module, "FLUSH_INTERVAL_S", 0.005)
        self.patch.setattr(writer_module, "FLUSH_INTERVAL_S", 0.005)
        self.directory = Path(tempfile.mkdtemp())
        self.cluster = Cluster(settings_for(self.directory))
        self.links = [Link(self.cluster) for _ in range(RANKS)]
        self.observers = [
            Observer(self.cluster.settings, Identity(rank, RANKS, rank, 1), self.links[rank]) for rank in range(RANKS)
        ]
        self.logged = [0] * RANKS

    @rule(rank=st.integers(0, RANKS - 1), count=st.integers(1, 60))
    def log(self, rank: int, count: int) -> None:
        for _ in range(count):
            self.observers[rank].log({"x": self.logged[rank]}, self.logged[rank])
            self.logged[rank] += 1

    @rule(rank=st.integers(0, RANKS - 1))
    def flush(self, rank: int) -> None:
        if not self.links[rank].cut and self.logged[rank]:
            assert self.observers[rank].flush(20)
            there = [step for number, step, _ in logged_in(self.cluster.files) if number == rank]
            assert there == list(range(self.logged[rank]))

    @rule()
    def kill_writer(self) -> None:
        self.cluster.kill()

    @rule(rank=st.integers(0, RANKS - 1))
    def cut(self, rank: int) -> None:
        self.links[rank].cut = True

    @rule(rank=st.integers(0, RANKS - 1))
    def mend(self, rank: int) -> None:
        self.links[rank].cut = False

    @rule(rank=st.integers(0, RANKS - 1), count=st.integers(1, 3))
    def lose_answers(self, rank: int, count: int) -> None:
        self.links[rank].lose_answers = count

    @invariant()
    def counts_add_up(self) -> None:
        for rank, observer in enumerate(getattr(self, "observers", [])):
            counts = observer.statistics()
            assert counts.logged == self.logged[rank]

    def teardown(self) -> None:
        try:
            if hasattr(self, "observers"):
                self.check()
        finally:
            try:
                if hasattr(self, "cluster"):
                    self.cluster.kill()
                    shutil.rmtree(self.directory, ignore_errors=True)
            finally:
                if hasattr(self, "patch"):
                    self.patch.undo()

    def check(self) -> None:
        """Everything is in the files once."""
        self.patch.setattr(channel_module, "UNREACHABLE_S", 0.1)
        for observer in self.observers:
            observer.finish(timeout=20)
        files = find_runs([self.directory])
        there: dict[int, list[int]] = {rank: [] for rank in range(RANKS)}
        for run in files:
            for rank, step, _ in logged_in(run):
                there[rank].append(step)
        for rank in range(RANKS):
            assert sorted(there[rank]) == list(range(self.logged[rank]))
        for run in files:
            for account in archive.load_run(run).accounts:
                assert account.logged == self.logged[account.rank]
                assert account.written + account.spooled == account.logged


TestJob = Job.TestCase
TestJob.settings = hypothesis_settings(max_examples=30, stateful_step_count=15, deadline=None, print_blob=True)


@pytest.mark.parametrize("seed", range(6))
def test_a_small_jepsen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Six ranks at full speed, and a seeded history of kills (also two in a row), cuts, delays and lost answers."""
    mortal(monkeypatch)
    monkeypatch.setattr(flusher_module, "RETRY_S", (0.01, 0.1))
    monkeypatch.setattr(batches_module, "UNSENT_BYTES", 50_000)
    chance = random.Random(seed)
    ranks, steps = 6, 3000
    cluster = Cluster(settings_for(tmp_path))
    links = [Link(cluster) for _ in range(ranks)]
    observers = [Observer(cluster.settings, Identity(rank, ranks, rank, 1), links[rank]) for rank in range(ranks)]

    def train(rank: int) -> None:
        for step in range(steps):
            observers[rank].log({"x": step * ranks + rank}, step)
            if step % 50 == 0:
                time.sleep(0.005)  # the pace of a training

    trainings = [threading.Thread(target=train, args=(rank,)) for rank in range(ranks)]
    for training in trainings:
        training.start()
    while any(training.is_alive() for training in trainings):
        time.sleep(chance.uniform(0.0, 0.1))  # the history's own pace
        link = chance.choice(links)
        match chance.choice(["kill", "kill twice", "cut", "mend", "lose", "delay"]):
            case "kill":
                cluster.kill()
            case "kill twice":
                cluster.kill()
                cluster.find()
                cluster.kill()
            case "cut":
                link.cut = True
            case "mend":
                link.cut = False
            case "lose":
                link.lose_answers = 2
            case "delay":
                link.delay = chance.uniform(0, 0.01)
    for link in links:
        link.cut, link.lose_answers, link.delay = False, 0, 0.0
    finishing = [threading.Thread(target=observer.finish) for observer in observers]
    for one in finishing:
        one.start()
    for one in finishing:
        one.join()
    found = sorted((rank, step, values["x"]) for rank, step, values in logged_in(cluster.files))
    assert found == [(rank, step, float(step * ranks + rank)) for rank in range(ranks) for step in range(steps)]
    run = archive.load_run(cluster.files)
    assert run.state == "success"
    assert all(account.logged == account.written == steps for account in run.accounts)
    assert cluster.incarnations > 1


def test_two_incarnations_alive_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node of the old one was cut off: it must not acknowledge, and its ranks go over to the new one."""
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path))
    link = Link(cluster)
    observer = Observer(cluster.settings, Identity(0, 1, 0, 1), link)
    observer.log({"x": 0}, 0)
    assert observer.flush()
    old = cluster.writer
    assert old is not None
    new = Writer("r", cluster.settings)
    observer.log({"x": 1}, 1)
    wait_until(lambda: old._journal.fenced)
    with pytest.raises(Fenced):
        old.ingest(Sign(0, observer._life, Counts()))
    with pytest.raises(Fenced):
        old.hello(observer._hello(0))
    assert observer.statistics().acknowledged == 1
    assert any("Another writer has taken over" in notice for notice in old.status().notices)
    cluster.writer = new
    assert observer.flush(20)
    assert observer.finish()
    assert [(step, values) for _, step, values in logged_in(cluster.files)] == [(0, {"x": 0.0}), (1, {"x": 1.0})]
    assert archive.load_run(cluster.files).state == "success"


def test_memory_stays_bounded_when_the_disk_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer takes no more than its bound, and the ranks keep the rest."""
    mortal(monkeypatch)
    monkeypatch.setattr(writer_module, "BACKLOG_BYTES", 20_000)
    monkeypatch.setattr(batches_module, "UNSENT_BYTES", 20_000)
    monkeypatch.setattr(batches_module, "EVENTS_PER_BATCH", 1000)
    stuck = threading.Event()
    real = Journal._commit
    monkeypatch.setattr(Journal, "_commit", lambda self, group: (stuck.wait(), real(self, group))[1])
    cluster = Cluster(settings_for(tmp_path))
    observer = Observer(cluster.settings, Identity(0, 1, 0, 1), Link(cluster))
    assert observer.wait_ready(10)
    for step in range(30_000):
        observer.log({"x": random.random()}, step)
    journal = cluster.find()._journal
    wait_until(lambda: observer.statistics().spooled > 10_000 and journal.queued_bytes > 20_000)
    window = observer._channel._window
    refused = window.held_until
    wait_until(lambda: window.held_until > refused or all(sent.taken for sent in window.under_way))
    # A window has four batches of 1,000 events: the bound, and the one that reaches it, are less.
    assert journal.queued_bytes < 20_000 + 1000 * 20
    assert observer.statistics().acknowledged == 0
    stuck.set()
    assert observer.finish()
    assert sum(1 for _ in logged_in(cluster.files)) == 30_000
