"""A training that runs steps again in one process, from ``log()`` to SwanLab: run on disk, cloud, ledger."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from swanlab_ray.actors.completions.buffers import TABLE
from swanlab_ray.actors.delivery import follow as reducer_module
from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.wire.status import WriterStatus
from swanlab_ray.observer.history import archive, transcripts, upload
from swanlab_ray.observer.observer import Observer
from tests.conftest import wait_until
from tests.incarnations import Cluster, Link, mortal, rank, settings_for
from tests.journals import write_journal
from tests.swanlab_cloud import SwanLabCloud
from tests.swanlab_file import RunFile, ended_run

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

ROLLED_BACK = dict.fromkeys(range(21), 100.0) | dict.fromkeys(range(21, 41), 200.0)


@pytest.fixture(autouse=True)
def _mortal(monkeypatch: pytest.MonkeyPatch) -> None:
    mortal(monkeypatch, swanlab=True)


def roll_back(ranks: list[Observer]) -> None:
    """The loss explodes at step 30; they go on from their checkpoint of step 20."""
    for steps, loss in ((range(31), 100.0), (range(21, 41), 200.0)):
        for step in steps:
            for observer in ranks:
                observer.log({"loss": loss}, step)
        for observer in ranks:
            assert observer.flush(20)


def ended(cluster: Cluster, ranks: list[Observer]) -> WriterStatus:
    for observer in ranks:
        assert observer.finish()
    wait_until(lambda: cluster.find().status().closed)
    status: WriterStatus = cluster.find().status()
    return status


def points(run: RunFile) -> int:
    return sum(map(len, run.scalars.values()))


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_on_disk_has_the_later_values(tmp_path: Path, world: int) -> None:
    cluster = Cluster(settings_for(tmp_path))
    ranks = [rank(cluster, Link(cluster), number, world) for number in range(world)]
    roll_back(ranks)
    status = ended(cluster, ranks)
    run = ended_run(tmp_path)
    assert run.scalars["loss"] == ROLLED_BACK
    assert status.written == points(run)
    assert (status.late, status.repeated, status.rejected) == (0, 0, 0)
    assert status.notices == []
    assert archive.latest_values(archive.load_run(cluster.files)) == {"loss": (40, 200.0)}


def test_a_run_on_disk_that_is_too_large_for_that_counts_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reducer_module.REWRITE_SCALARS, "offline", 10)
    cluster = Cluster(settings_for(tmp_path))
    ranks = [rank(cluster, Link(cluster))]
    roll_back(ranks)
    status = ended(cluster, ranks)
    run = ended_run(tmp_path)
    assert run.scalars["loss"] == dict.fromkeys(range(31), 100.0) | dict.fromkeys(range(31, 41), 200.0)
    assert status.written == points(run)
    (told,) = status.notices
    assert told.startswith("Steps were run again; this SwanLab run shows their first values.")
    summary = archive.load_run(cluster.files).summary
    assert summary.closed is not None
    assert not summary.closed.complete


def test_the_cloud_has_the_later_values_also_when_it_is_uploaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SwanLabCloud() as cloud:
        for name, value in cloud.environment().items():
            monkeypatch.setenv(name, value)
        cluster = Cluster(settings_for(tmp_path, mode="cloud"))
        ranks = [rank(cluster, Link(cluster), number, 2) for number in range(2)]
        roll_back(ranks)
        ended(cluster, ranks)
        whole = cloud.only().points
        assert whole["loss"] == ROLLED_BACK
        assert [synced.uploaded for synced in upload.sync(tmp_path)] == [0]
        cloud.experiments.clear()
        upload.sync(tmp_path)
        assert cloud.only().points == whole
        assert [synced.uploaded for synced in upload.sync(tmp_path)] == [0]


@pytest.mark.parametrize("world", [1, 2])
def test_steps_that_are_counted_per_epoch_are_told_and_counted(tmp_path: Path, world: int) -> None:
    cluster = Cluster(settings_for(tmp_path))
    ranks = [rank(cluster, Link(cluster), number, world) for number in range(world)]
    for epoch in range(3):
        for step in range(100):
            for observer in ranks:
                observer.log({"loss": float(epoch * 100 + step)}, step)
        for observer in ranks:
            assert observer.flush(20)
    status = ended(cluster, ranks)
    run = ended_run(tmp_path)
    assert run.scalars["loss"] == {step: float(step) for step in range(100)}
    assert status.written == points(run)
    assert (status.repeated, status.late) == (200 * world, 0)
    (told,) = status.notices
    assert told.startswith("Logged twice: rank 0 has logged 'loss' at step 0 before. The first value stands,")
    afterwards = archive.load_run(cluster.files)
    assert archive.latest_values(afterwards) == {"loss": (99, 99.0)}
    assert f"  repeated: {200 * world} values that their rank had logged before" in "\n".join(
        archive.describe(afterwards, {})
    )
    in_swanlab = afterwards.as_json()["in_swanlab"]
    assert (in_swanlab["repeated"], in_swanlab["late"]) == (200 * world, 0)


def test_completions_that_are_run_again_are_replaced(tmp_path: Path) -> None:
    cluster = Cluster(settings_for(tmp_path, completion_log_interval=1))
    ranks = [rank(cluster, Link(cluster))]
    for steps, word in ((range(1, 6), "first"), (range(3, 8), "second")):
        ranks[0].progress(steps[0] - 1, 10)
        for step in steps:
            ranks[0].log_completions([{"text": word}], step)
            ranks[0].log({"x": 1.0}, step)
            ranks[0].progress(step, 10)
        assert ranks[0].flush(20)
    ended(cluster, ranks)
    expected = [(1, "first"), (2, "first"), *((step, "second") for step in range(3, 8))]
    assert [(row["step"], row["text"]) for row in ended_run(tmp_path).table(TABLE)] == expected
    assert [(row["step"], row["text"]) for row in transcripts.completions(cluster.files)] == expected


@pytest.mark.parametrize("harm", ["stray journal", "no journal", "sink"])
def test_whatever_stands_in_the_way_of_writing_it_anew_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    cluster = Cluster(settings_for(tmp_path))
    ranks = [rank(cluster, Link(cluster))]
    roll_back(ranks)
    directory = tmp_path / "observer" / "r"
    if harm == "stray journal":
        write_journal(tmp_path / "elsewhere", "other", [])
        (stray,) = (tmp_path / "elsewhere").rglob("journal-*.log")
        os.rename(stray, directory / "spool-7-stray.log")
        assert len(find_runs([directory])) == 2
    elif harm == "no journal":
        monkeypatch.setattr(reducer_module, "find_runs", lambda paths: [])
    else:
        monkeypatch.setattr(reducer_module, "supersession", lambda run: 1 / 0)
    status = ended(cluster, ranks)
    assert status.state == "success"
    run = ended_run(tmp_path)
    if harm == "stray journal":
        assert (run.scalars["loss"], status.notices) == (ROLLED_BACK, [])
    else:
        assert run.scalars["loss"][25] == 100.0
        assert run.state == "finished"
        assert any("could not be written anew" in told for told in status.notices)
    assert status.written == points(run)


def test_a_journal_that_cannot_be_followed_ends_the_run_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any error of reading, be it no error that was thought of."""
    mortal(monkeypatch)  # one process has one SwanLab client, and a killed writer leaves its own behind
    cluster = Cluster(settings_for(tmp_path))
    observer = rank(cluster, Link(cluster))
    observer.log({"x": 1.0}, 1)
    assert observer.flush(20)
    cluster.kill()

    def fails(*arguments: Any) -> Any:
        raise ValueError("thought of by nobody")

    monkeypatch.setattr("swanlab_ray.actors.journal.reading.Follower.read", fails)
    observer.log({"x": 2.0}, 2)
    status = ended(cluster, [observer])
    assert status.state == "success"
    assert any("thought of by nobody" in told for told in status.notices)
