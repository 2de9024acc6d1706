"""The machine of the writer loses its power; the ranks, on others, live on."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swanlab_ray.actors.journal import writing as journal_module
from swanlab_ray.actors.journal.batches import BatchReader
from swanlab_ray.actors.journal.records import Batch
from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.actors.wire.events import Scalars
from swanlab_ray.actors.wire.messages import WINDOW
from swanlab_ray.actors.writer import actor as writer_module
from swanlab_ray.observer.history import archive
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.transport import batches as batches_module
from swanlab_ray.observer.transport import flusher as flusher_module
from tests.conftest import wait_until
from tests.incarnations import Cluster, Link, mortal, rank, settings_for
from tests.power_loss import PowerDisk, lose_power

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
RANKS = 2


class Job:
    """Ranks that log events of three pages, which no compression makes small."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        mortal(patch)
        PowerDisk.stored.clear()
        patch.setattr(PowerDisk, "sick", False)
        patch.setattr(journal_module, "Disk", PowerDisk)
        patch.setattr(journal_module, "RETRY_S", 0.01)
        patch.setattr(batches_module, "UNSENT_BYTES", 200_000)
        patch.setattr(batches_module, "EVENTS_PER_BATCH", 10)
        patch.setattr(flusher_module, "RETRY_S", (0.005, 0.02))
        patch.setattr(flusher_module, "FLUSH_INTERVAL_S", 0.005)
        patch.setattr(writer_module, "FLUSH_INTERVAL_S", 0.005)
        self.directory = Path(tempfile.mkdtemp())
        self.cluster = Cluster(settings_for(self.directory, rank_series=0))
        self.links = [Link(self.cluster) for _ in range(RANKS)]
        self.observers = [rank(self.cluster, link, number, RANKS) for number, link in enumerate(self.links)]
        self.logged = 0

    @property
    def disk(self) -> PowerDisk:
        self.cluster.find()
        disk = PowerDisk.made[-1]
        assert isinstance(disk, PowerDisk)
        return disk

    def log(self, count: int) -> None:
        for link in self.links:
            link.delay = 0.01  # so that batches are larger than a block of the file
        for _ in range(count):
            for observer in self.observers:
                observer.log({str(name): random.random() for name in range(1500)}, self.logged)
            self.logged += 1

    def fill(self) -> None:
        """Wait until each rank has as much under way as it may, or no more to send."""

        def full(observer: Observer) -> bool:
            window = list(observer._channel._window.under_way)
            held = observer.statistics()
            all_of_it = sum(sent.batch.events for sent in window) == held.waiting + held.spooled
            return all(sent.taken for sent in window) and (all_of_it or len(window) == WINDOW)

        wait_until(lambda: all(map(full, self.observers)), 10)
        for link in self.links:
            link.delay = 0.0

    def steps(self) -> dict[int, list[int]]:
        """Of each rank, as readers get them."""
        (run,) = find_runs([self.directory])
        reader = BatchReader()
        found: dict[int, list[int]] = {number: [] for number in range(RANKS)}
        for entry in merged(run):
            if isinstance(entry, Batch):
                found[entry.rank] += [event.step for event in reader.events(entry) if isinstance(event, Scalars)]
        assert not reader.unread
        return found

    def finish(self) -> None:
        for observer in self.observers:
            assert observer.finish(timeout=20)
        assert self.steps() == {number: list(range(self.logged)) for number in range(RANKS)}
        (run,) = find_runs([self.directory])
        for account in archive.load_run(run).accounts:
            assert (account.logged, account.written, account.missing) == (self.logged, self.logged, 0)
            assert account.spooled == sum(account.dropped.values()) == 0
        assert self.cluster.writer is not None
        assert self.cluster.writer.status().received == RANKS * self.logged
        reducer: Any = self.cluster.writer._parts.reducer
        steps = [step for step, _ in reducer.sink.rows]
        assert steps == sorted(steps)

    def close(self) -> None:
        if self.cluster.writer is not None:
            self.disk.allow(1 << 60)
        self.cluster.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def choices(pages: int) -> st.SearchStrategy[list[bool]]:
    """Any pages are lost; or one hole is, which leaves more to be read behind it."""
    places = st.integers(0, pages)
    hole = st.tuples(places, places).map(lambda ends: [not min(ends) <= page < max(ends) for page in range(pages)])
    return st.one_of(hole, hole, st.lists(st.booleans(), min_size=pages, max_size=pages))


histories = st.lists(st.tuples(st.integers(1, 25), st.integers(0, 2), st.booleans()), min_size=1, max_size=2)


@given(history=histories, data=st.data())
@settings(deadline=None, max_examples=6, print_blob=True)
def test_what_was_acknowledged_is_there_and_the_rest_is_sent_again(
    history: list[tuple[int, int, bool]], data: st.DataObject
) -> None:
    """Each time the machine loses any of the pages that were not synced; sometimes the disk had failed before."""
    with pytest.MonkeyPatch.context() as patch:
        job = Job(patch)
        try:
            job.log(3)
            assert all(observer.flush(20) for observer in job.observers)
            for count, syncs, sick in history:
                lose(job, count, syncs, sick, lambda pages: data.draw(choices(pages)))
            job.finish()
        finally:
            job.close()


def lose(job: Job, count: int, syncs: int, sick: bool, kept: Any) -> int:
    """Lose power after so many more syncs, with as much under way as there may be; the pages that were in doubt."""
    disk = job.disk
    disk.allow(0)
    job.log(count)
    job.fill()
    if sick:
        PowerDisk.sick = True
        disk.allow(3)
    else:
        disk.allow(syncs)
    wait_until(lambda: disk.waits or all(one.statistics().acknowledged == job.logged for one in job.observers), 10)
    for link in job.links:
        link.cut = True  # the network goes with the machine
    disk.kill()
    writer = job.cluster.kill()
    assert writer is not None
    writer._journal._thread.join(10)
    acknowledged = [observer.statistics().acknowledged for observer in job.observers]
    doubtful = lose_power(kept)
    PowerDisk.sick = False
    there = job.steps()
    for number, counted in enumerate(acknowledged):
        assert set(there[number]) >= set(range(counted))
    for link in job.links:
        link.cut = False
    return doubtful
