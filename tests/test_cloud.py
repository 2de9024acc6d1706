"""Cloud mode: SwanLab's real client against a stand-in server with faults. The server ends with every point, once."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from swanlab_ray.actors.delivery import cloud as cloud_run
from swanlab_ray.actors.delivery import follow as reducer
from swanlab_ray.actors.delivery import sink
from swanlab_ray.actors.delivery.cloud import CloudRun
from swanlab_ray.actors.membership import lost
from swanlab_ray.actors.runs.at_work import AtWork
from swanlab_ray.actors.runs.finding import RunFiles
from swanlab_ray.actors.settings import SettingsError
from swanlab_ray.actors.swanlab import sdk
from swanlab_ray.actors.swanlab.experiment import CloudError
from swanlab_ray.actors.wire.status import WriterStatus
from swanlab_ray.observer import sync
from swanlab_ray.observer.cli import main
from swanlab_ray.observer.job.identity import Identity
from swanlab_ray.observer.observer import Observer
from tests.conftest import wait_until
from tests.incarnations import Cluster, Link, mortal, settings_for
from tests.swanlab_cloud import KEY, Fault, SwanLabCloud

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

STEPS = 200


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[SwanLabCloud]:
    mortal(monkeypatch, swanlab=True)
    monkeypatch.setattr(cloud_run, "RETRY_S", (0.02, 0.2))
    monkeypatch.setattr(sink, "FINISH_DEADLINE_S", 20.0)
    with SwanLabCloud() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


class Job:
    """Two ranks and their writer, in this process."""

    def __init__(self, log_dir: Path, **values: Any) -> None:
        self.log_dir = log_dir
        self.cluster = Cluster(settings_for(log_dir, **({"mode": "cloud"} | values)))
        self.observers = self.ranks()

    def ranks(self) -> list[Observer]:
        settings = self.cluster.settings
        return [Observer(settings, Identity(rank, 2, rank, 1), Link(self.cluster)) for rank in range(2)]

    def log(self, steps: range, factor: float = 1.0) -> None:
        for step in steps:
            for rank, observer in enumerate(self.observers):
                observer.log({"x": factor * (step * 2 + rank)}, step)
        for observer in self.observers:
            assert observer.flush(20)

    def finish(self, state: Any = "success") -> WriterStatus:
        for observer in self.observers:
            assert observer.finish(state)
        assert self.observers[1].outcome is not None
        return self.observers[1].outcome

    def delivered(self, scalars: int) -> None:
        wait_until(lambda: self.cluster.find().status().written >= scalars)


def expected(steps: range, factor: float = 1.0) -> dict[str, dict[int, float]]:
    of = {rank: {step: factor * (step * 2 + rank) for step in steps} for rank in range(2)}
    return {
        "rank/0/x": of[0],
        "rank/1/x": of[1],
        "x": {step: (of[0][step] + of[1][step]) / 2 for step in steps},
        "ranks/x/mean": {step: (of[0][step] + of[1][step]) / 2 for step in steps},
        "ranks/x/min": of[0],
        "ranks/x/max": of[1],
        "ranks/x/p95": of[1],
        "ranks/x/argmax": dict.fromkeys(steps, 1.0),
    }


def test_every_point_once_with_its_time_and_the_end(tmp_path: Path, cloud: SwanLabCloud) -> None:
    job = Job(tmp_path)
    job.observers[0].config({"lr": 0.1, "model": {"layers": 2}})
    began = time.time()
    job.log(range(STEPS))
    status = job.finish()
    experiment = cloud.only()
    assert experiment.points == expected(range(STEPS))
    assert experiment.repeated == 0
    assert experiment.columns == set(expected(range(1)))
    assert experiment.state == "FINISHED"
    assert experiment.profile["config"]["lr"]["value"] == 0.1
    assert experiment.profile["config"]["model"]["value"] == {"layers": 2}
    assert experiment.times["x"][0][:16] == time.strftime("%Y-%m-%dT%H:%M", time.gmtime(began))
    assert status.url == f"{cloud.url}/@tester/p/runs/r"
    assert status.notices == []
    assert not list(tmp_path.glob("run-*"))  # the journal is the backup


def test_variables_that_swanlab_s_client_would_fail_on(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SWANLAB_MODE": "", "SWANLAB_RUN_ID": " ", "SWANLAB_PROJECT": "p"}.items():
        monkeypatch.setenv(name, value)
    job = Job(tmp_path)
    job.log(range(2))
    assert job.finish().notices == []
    assert cloud.only().points == expected(range(2))


def test_a_crash_is_told_with_its_reason(tmp_path: Path, cloud: SwanLabCloud) -> None:
    job = Job(tmp_path)
    job.log(range(3))
    job.observers[0].finish("crashed", "ValueError: boom")
    job.observers[1].finish()
    assert cloud.only().state == "CRASHED"
    assert "ValueError: boom" in cloud.only().logs[0]["message"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("metrics$", 500, count=5),
        Fault("metrics$", 500, count=3, applied=True),
        Fault("metrics$", 429, count=5),
        Fault("metrics$", 401, count=5),
        Fault("metrics$", 404, count=2),
        Fault("series$", 503, count=2),
        Fault("profile$", 500, count=2),
        Fault("state$", 500, count=2),
        Fault("metrics$", 0, count=10, delay=0.1),
        Fault("experiment$", 403, count=2),
        Fault("api_key$", 401, count=2),
    ],
    ids=lambda fault: f"{re.sub('[^a-z_]', '', fault.match)}-{fault.status}{'-applied' * fault.applied}",
)
def test_faults_cost_nothing(tmp_path: Path, cloud: SwanLabCloud, fault: Fault) -> None:
    """SwanLab's own client drops what is answered with 401, 404 or 429, and says the run is complete."""
    cloud.faults.append(fault)
    job = Job(tmp_path)
    job.observers[0].config({"lr": 0.1})
    job.log(range(STEPS))
    status = job.finish()
    assert cloud.only().points == expected(range(STEPS))
    assert cloud.only().state == "FINISHED"
    assert cloud.only().profile["config"]["lr"]["value"] == 0.1
    assert len([notice for notice in status.notices if "cannot be used" in notice]) == (
        fault.status != 0 and fault.match != "state$"  # that request SwanLab's client repeats itself
    )
    assert status.thinned == 0


def test_a_value_that_the_server_refuses_for_good_costs_no_other(tmp_path: Path, cloud: SwanLabCloud) -> None:
    cloud.dislikes = lambda key, step: (key, step) == ("rank/1/x", 50)
    job = Job(tmp_path)
    job.log(range(STEPS))
    status = job.finish()
    whole = expected(range(STEPS))
    whole["rank/1/x"] = {step: value for step, value in whole["rank/1/x"].items() if step != 50}
    assert cloud.only().points == whole
    assert (status.written, status.withheld) == (8 * STEPS - 1, 1)
    assert status.notices == [
        "The SwanLab cloud does not take some values of 'rank/1/x' (HTTP 422: invalid metric); the journal has them."
    ]
    assert cloud.only().state == "FINISHED"
    synced = CliRunner().invoke(main, ["sync", str(job.cluster.files.paths[0].parent)])  # of nothing but that value
    assert synced.exit_code == 0, synced.output
    assert "does not take some values of 'rank/1/x'" in synced.output


@pytest.mark.parametrize("of", ["series", "points"])
def test_a_name_that_the_server_refuses_is_not_sent_again(tmp_path: Path, cloud: SwanLabCloud, of: str) -> None:
    """It costs a few requests once, nothing later, and nobody is told that the cloud cannot be used."""
    asked: list[str] = []

    def dislikes(key: str, step: int) -> bool:
        bad = key.startswith("bad") and (of == "series" or step > 0)
        asked.extend([key] * bad)
        return bad

    cloud.dislikes = dislikes
    job = Job(tmp_path, rank_series=0)
    for step in range(1, 16):
        job.observers[0].log_job({"good": step, "bad/one": 1.0, "fine": step, "bad/two": 2.0}, step)
        for observer in job.observers:
            assert observer.flush(20)
        job.delivered(2 * step)
    requests, first = len(cloud.requests), len(asked)
    job.observers[0].log_job({"good": 16, "bad/one": 1.0}, 16)
    job.observers[0].flush(20)
    job.delivered(2 * 15 + 1)
    assert (len(cloud.requests), len(asked)) == (requests + 1, first)
    status = job.finish()
    assert cloud.only().points == {
        "good": {step: step for step in range(1, 17)},
        "fine": {step: step for step in range(1, 16)},
    }
    assert (status.written, status.withheld) == (31, 31)
    assert len(status.notices) == 2
    assert all("The SwanLab cloud does not take" in notice for notice in status.notices)
    assert requests < 15 * 2 + 30
    synced = CliRunner().invoke(main, ["sync", str(job.cluster.files.paths[0].parent)])
    assert synced.exit_code == 0, synced.output


def test_a_name_over_which_the_server_stumbles_holds_up_nothing(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers with 500 again and again, to this name only."""
    real = cloud._metrics

    def stumbling(body: Any, headers: Any) -> tuple[int, Any]:
        bad = any(metric["key"] == "rank/1/x" and metric["index"] >= 10 for metric in body["metrics"])
        return (500, {"message": "oops"}) if bad else real(body, headers)

    job = Job(tmp_path)
    job.log(range(10))
    job.delivered(80)
    monkeypatch.setattr(cloud, "_metrics", stumbling)
    job.log(range(10, 30))
    status = job.finish()
    whole = expected(range(30))
    whole["rank/1/x"] = {step: value for step, value in whole["rank/1/x"].items() if step < 10}
    assert cloud.only().points == whole
    assert (status.written, status.withheld) == (220, 20)
    assert cloud.only().state == "FINISHED"


@pytest.mark.parametrize("before", [True, False], ids=["later", "from the start"])
def test_a_gateway_that_refuses_everything_for_a_while_marks_no_name(
    tmp_path: Path, cloud: SwanLabCloud, before: bool
) -> None:
    job = Job(tmp_path)
    if before:
        job.log(range(10))
        job.delivered(80)
    cloud.dislikes = lambda key, step: True
    job.log(range(10, 20))
    wait_until(lambda: bool(job.cluster.find().status().notices))
    cloud.dislikes = lambda key, step: False
    job.log(range(20, 30))
    status = job.finish()
    assert cloud.only().points == expected(range(0 if before else 10, 30))
    assert status.withheld == 0
    assert ["cannot be used" in notice for notice in status.notices] == [True]


def test_a_gateway_that_comes_to_itself_while_it_is_asked_marks_no_name(tmp_path: Path, cloud: SwanLabCloud) -> None:
    """What it has refused until then was no fault of the names; and it is not asked for each of them."""
    names = [f"layer{number}" for number in range(100)]
    job = Job(tmp_path, rank_series=0)
    wait_until(lambda: bool(cloud.experiments))
    before = len(cloud.requests)
    cloud.dislikes = lambda key, step: len(cloud.requests) < before + 30
    job.observers[0].log_job(dict.fromkeys(names, 1.0), 1)
    status = job.finish()
    assert (status.written, status.withheld) == (100, 0)
    assert cloud.only().points == {name: {1: 1.0} for name in names}
    assert len(cloud.requests) < before + 60


def test_a_first_value_that_the_server_refuses_holds_up_nothing(tmp_path: Path, cloud: SwanLabCloud) -> None:
    """Whether it is the value's fault shows with what comes behind."""
    cloud.dislikes = lambda key, step: key == "bad"
    job = Job(tmp_path, rank_series=0)
    job.observers[0].log_job({"bad": 1.0}, 1)
    wait_until(lambda: bool(job.cluster.find().status().notices))
    job.observers[0].log_job({"good": 1.0}, 2)
    job.delivered(1)
    status = job.finish()
    assert cloud.only().points == {"good": {2: 1.0}}
    assert (status.written, status.withheld) == (1, 1)


def test_a_part_of_the_configuration_that_the_server_refuses_costs_no_other(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cloud._profile

    def picky(body: Any, headers: Any, run: str) -> tuple[int, Any]:
        return (413, {"message": "too large"}) if "b" in body.get("config", {}) else real(body, headers, run)

    monkeypatch.setattr(cloud, "_profile", picky)
    job = Job(tmp_path)
    job.observers[0].config({"a": 1, "b": 2, "c": 3, "text": "x" * 100_000, "nan": float("nan")})
    job.log(range(3))
    status = job.finish()
    config = {name: entry["value"] for name, entry in cloud.only().profile["config"].items()}
    assert (config["a"], config["c"], config["nan"], len(config["text"])) == (1, 3, "NaN", 16_384 + 28)
    assert cloud.only().points == expected(range(3))
    assert len(status.notices) == 1
    assert "does not take 'b' of this run's configuration (ApiError: API Request Failed: [413]" in status.notices[0]


def test_a_refused_table_costs_no_scalar(tmp_path: Path, cloud: SwanLabCloud) -> None:
    cloud.dislikes = lambda key, step: key == "rlhf_completions"
    job = Job(tmp_path)
    job.log(range(3))
    job.delivered(24)
    job.observers[0].log_completions([{"prompt": "p", "completion": "c"}], 2)
    job.log(range(3, 6))
    status = job.finish()
    assert cloud.only().points == expected(range(6))
    assert ["does not take some completions" in notice for notice in status.notices] == [True]
    synced = CliRunner().invoke(main, ["sync", str(job.cluster.files.paths[0].parent)])
    assert synced.exit_code == 0, synced.output
    assert "does not take some completions" in synced.output


def test_a_refused_table_before_any_scalar_holds_up_nothing(tmp_path: Path, cloud: SwanLabCloud) -> None:
    cloud.dislikes = lambda key, step: key == "rlhf_completions"
    job = Job(tmp_path)
    for observer in job.observers:
        observer.log_completions([{"prompt": "p", "completion": "c"}], 1)
        observer.progress(2)
        assert observer.flush(20)
    wait_until(lambda: bool(job.cluster.find().status().notices))
    job.log(range(3))
    status = job.finish()
    assert cloud.only().points == expected(range(3))
    assert (status.completions, status.completions_dropped, status.withheld) == (2, 2, 0)


def test_what_its_client_cannot_even_send_costs_no_other(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it raises what nobody has foreseen."""
    real = sdk.scalar

    def scalar(key: str, step: int, *rest: Any) -> Any:
        if key == "rank/0/x" and step % 2:
            raise KeyError("of another version")
        return real(key, step, *rest)

    monkeypatch.setattr(sdk, "scalar", scalar)
    job = Job(tmp_path)
    job.log(range(20))
    status = job.finish()
    whole = expected(range(20))
    whole["rank/0/x"] = {step: value for step, value in whole["rank/0/x"].items() if not step % 2}
    assert cloud.only().points == whole
    assert (status.written, status.withheld) == (150, 10)


def test_rows_that_come_while_a_request_is_put_together(tmp_path: Path, cloud: SwanLabCloud) -> None:
    taken, written = threading.Event(), threading.Event()

    class Slow(dict[str, float]):
        def __len__(self) -> int:
            if threading.current_thread().name == "swanlab-sink":
                taken.set()
                written.wait(0.3)  # the other thread's time
            return super().__len__()

    told: list[str] = []
    run = CloudRun(settings_for(tmp_path, mode="cloud"), "r", 0, "", lambda rows: None, told.append, lambda run: None)
    run.start()
    run.write(0, 1, Slow(x=0.0))
    assert taken.wait(20)
    run.write(1, 1, {"x": 1.0})
    written.set()
    run.finish("success", None)
    assert run.closed.wait(20)
    assert (run.written, run.withheld, run.complete, told) == (2, 0, True, [])
    assert cloud.only().points == {"x": {0: 0.0, 1: 1.0}}


def test_an_outage_from_the_start(tmp_path: Path, cloud: SwanLabCloud) -> None:
    cloud.stop()
    job = Job(tmp_path)
    job.log(range(STEPS))
    wait_until(lambda: bool(job.cluster.find().status().notices))
    (notice,) = job.cluster.find().status().notices
    assert f"cannot be used ({cloud.url} cannot be reached)" in notice
    assert f"swanlab-ray sync {tmp_path / 'observer' / 'r'}" in notice
    cloud.start()
    job.log(range(STEPS, 2 * STEPS))
    assert len(job.finish().notices) == 1
    assert cloud.only().points == expected(range(2 * STEPS))
    assert cloud.only().state == "FINISHED"


def test_a_long_outage_in_the_middle_does_not_fill_memory(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bounds nothing waits in memory: it is read from the journal when the server is back."""
    monkeypatch.setattr(sink, "QUEUE_BYTES", 50_000)
    monkeypatch.setattr(reducer, "AHEAD_BYTES", 20_000)
    job = Job(tmp_path)
    job.log(range(100))
    job.delivered(800)
    cloud.stop()
    for begin in range(100, 3000, 100):
        job.log(range(begin, begin + 100))
    reducing = job.cluster.find()._parts.reducer
    wait_until(lambda: reducing._behind)
    assert reducing._bytes <= 20_000 + 2 * 20_000
    assert reducing.sink._waiting <= 50_000 + 800
    assert job.cluster.find().status().lag > 0
    cloud.start()
    job.finish()
    assert cloud.only().points == expected(range(3000))
    assert cloud.only().repeated == 0


def test_a_server_that_is_dead_at_the_end_and_sync_afterwards(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "FINISH_DEADLINE_S", 2.0)
    job = Job(tmp_path)
    job.log(range(STEPS))
    job.delivered(8 * STEPS)
    cloud.stop()
    job.log(range(STEPS, 2 * STEPS))
    began = time.monotonic()
    status = job.finish()
    assert time.monotonic() - began < 2 + 10
    assert status.notices[-1].startswith("The SwanLab cloud does not have the whole run")
    cloud.start()
    (synced,) = sync(tmp_path)
    assert (synced.uploaded, synced.present, synced.damaged) == (8 * STEPS, 8 * STEPS, 0)
    assert cloud.only().points == expected(range(2 * STEPS))
    assert cloud.only().state == "FINISHED"
    assert cloud.only().repeated == 0


def test_sync_twice_and_into_gaps(tmp_path: Path, cloud: SwanLabCloud) -> None:
    job = Job(tmp_path)
    job.log(range(STEPS))
    job.finish()
    whole = expected(range(STEPS))
    cloud.experiments.clear()
    assert [run.uploaded for run in sync(tmp_path)] == [8 * STEPS]
    assert cloud.only().points == whole
    assert [run.uploaded for run in sync(tmp_path)] == [0]
    del cloud.only().points["x"][50]
    del cloud.only().points["rank/1/x"][3]
    del cloud.only().points["ranks/x/max"]
    assert [run.uploaded for run in sync(tmp_path / "observer" / "r")] == [2 + STEPS]
    assert cloud.only().points == whole
    assert cloud.only().repeated == 0
    assert len(cloud.experiments) == 1


def test_sync_can_be_interrupted(tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path)
    job.log(range(STEPS))
    job.finish()
    cloud.experiments.clear()
    monkeypatch.setattr("swanlab_ray.observer.history.upload.CHUNK_SCALARS", 100)
    cloud.faults += [Fault("nothing"), Fault("metrics$", 0, count=5), Fault("metrics$", 503, count=1)]
    with pytest.raises(CloudError, match="503"):
        sync(tmp_path)
    assert sum(map(len, cloud.only().points.values())) == 5 * 104
    assert cloud.only().state == "RUNNING"
    sync(tmp_path)
    assert cloud.only().points == expected(range(STEPS))
    assert cloud.only().repeated == 0
    assert cloud.only().state == "FINISHED"


@pytest.mark.parametrize("answer", [404, 503])
@pytest.mark.takes(15)
def test_a_server_that_cannot_export_points(tmp_path: Path, cloud: SwanLabCloud, answer: int) -> None:
    """An older deployment: then what lies beyond each series' highest step is uploaded, and that is told."""
    job = Job(tmp_path)
    job.log(range(STEPS))
    job.finish()
    for points in cloud.only().points.values():
        for step in range(150, STEPS):
            del points[step]
    cloud.faults.append(Fault("export$", answer, count=100))
    (synced,) = sync(tmp_path)
    assert synced.uploaded == 8 * 50
    (notice,) = synced.notices
    assert notice.startswith("Of each series only what lies beyond its highest step is uploaded: the server's points")
    assert cloud.only().points == expected(range(STEPS))
    assert cloud.only().repeated == 0


@pytest.mark.parametrize("moment", [0, 1, 7, 15])
def test_a_killed_writer_goes_on_in_the_same_experiment(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Killed at different moments of its uploads: no gap, no second experiment, hardly anything sent again."""
    monkeypatch.setattr(cloud_run, "CHUNK_SCALARS", 40)
    job = Job(tmp_path)
    requests = len(cloud.requests)
    for step in range(0, STEPS, 10):
        job.log(range(step, step + 10))
        if step == STEPS // 2:
            wait_until(lambda: len([r for r in cloud.requests[requests:] if r.endswith("metrics")]) >= moment)
            job.cluster.kill()
    status = job.finish()
    assert cloud.only().points == expected(range(STEPS))
    assert cloud.only().state == "FINISHED"
    assert cloud.only().opened == 2
    assert cloud.only().repeated <= 40  # the request that was under way when the writer was killed
    assert job.cluster.incarnations == 2
    assert all(rank.logged == rank.received == STEPS for rank in status.ranks)


@pytest.mark.takes(20)
def test_killed_again_and_again_with_faults(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud_run, "CHUNK_SCALARS", 64)
    job = Job(tmp_path)
    for round_ in range(6):
        cloud.faults += [Fault("metrics$", 500, applied=True), Fault("metrics$", 429), Fault("summaries", 500)]
        job.log(range(round_ * 50, round_ * 50 + 50))
        job.cluster.kill()
        if round_ == 3:
            job.cluster.find()
            job.cluster.kill()
    job.finish()
    assert cloud.only().points == expected(range(300))
    assert cloud.only().state == "FINISHED"
    assert len(cloud.experiments) == 1


def test_a_training_that_is_resumed_replaces_what_it_runs_again(tmp_path: Path, cloud: SwanLabCloud) -> None:
    """Life one reaches step 99, life two goes on from a checkpoint at 60 and ends at 79."""
    first = Job(tmp_path)
    first.log(range(100))
    first.finish("crashed")
    second = Job(tmp_path)
    second.log(range(60, 80), factor=10.0)
    second.finish()
    experiment = cloud.only()
    assert experiment.state == "FINISHED"
    assert experiment.opened == 2
    again = expected(range(60, 80), factor=10.0)
    for name, points in expected(range(100)).items():
        assert {step: experiment.points[name][step] for step in range(60)} == {s: points[s] for s in range(60)}, name
        assert {step: experiment.points[name][step] for step in range(60, 80)} == again[name], name
    cloud.experiments.clear()
    sync(tmp_path)  # elsewhere what does not stand any more is not uploaded at all
    assert set(cloud.only().points["x"]) == set(range(80))
    assert {step: cloud.only().points["x"][step] for step in range(60, 80)} == again["x"]
    assert cloud.only().points["x"][59] == expected(range(60))["x"][59]


def test_a_spool_is_merged_by_sync(tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 is cut off for good: its part is on its disk, and the means are those of both ranks after the sync."""
    monkeypatch.setattr(lost, "FAILED_RANK_GRACE_S", 1.0)
    monkeypatch.setattr("swanlab_ray.observer.transport.channel.UNREACHABLE_S", 0.2)
    job = Job(tmp_path, rank_timeout=3.0)
    job.log(range(50))
    link = job.observers[1]._channel._link
    assert isinstance(link, Link)
    link.cut = True
    for step in range(50, 100):
        for rank, observer in enumerate(job.observers):
            observer.log({"x": step * 2 + rank}, step)
    assert not job.observers[1].finish()
    assert job.observers[1].statistics().spooled == 50
    assert job.observers[0].finish()
    wait_until(lambda: [experiment.state for experiment in cloud.experiments.values()] == ["CRASHED"])
    (synced,) = sync(tmp_path)
    assert cloud.only().points == expected(range(100))
    assert synced.damaged == 0


def test_no_secret_is_in_the_journal_or_a_notice(tmp_path: Path, cloud: SwanLabCloud) -> None:
    cloud.faults.append(Fault("api_key$", 401, count=3))
    job = Job(
        tmp_path, api_key=KEY, lark_webhook_url="http://127.0.0.1:1/open-apis/bot/v2/hook/s3cret", lark_secret="s3cret"
    )
    job.log(range(3))
    status = job.finish()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes()
            assert b"s3cret" not in path.read_bytes()
    assert KEY not in repr(status)


def test_sync_goes_to_the_cloud_of_the_environment(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with its key to the one that the run has been in."""
    job = Job(tmp_path, api_host=cloud.url, web_host=cloud.url)
    job.log(range(3))
    job.finish()
    before = len(cloud.requests)
    with SwanLabCloud() as other:
        for name, value in other.environment().items():
            monkeypatch.setenv(name, value)
        sync(tmp_path)
    assert other.only().points == cloud.only().points
    assert len(cloud.requests) == before


def test_the_key_never_goes_to_a_host_that_only_a_journal_names(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWANLAB_API_KEY", KEY)
    monkeypatch.setenv("SWANLAB_API_HOST", cloud.url)
    job = Job(tmp_path, api_host=cloud.url, web_host=cloud.url, api_key=KEY)
    job.log(range(3))
    job.finish()
    points = cloud.only().points
    cloud.experiments.clear()
    before = len(cloud.requests)
    monkeypatch.delenv("SWANLAB_API_HOST")
    monkeypatch.delenv("SWANLAB_WEB_HOST")
    with pytest.raises(SettingsError, match=f"was in the cloud at '{cloud.url}'.* is for https://api.swanlab.cn"):
        sync(tmp_path)
    assert len(cloud.requests) == before
    with SwanLabCloud() as other:
        assert [run.uploaded for run in sync(tmp_path, api_host=other.url)] == [24]
        assert other.only().points == points
    assert len(cloud.requests) == before
    sync(tmp_path, api_host=cloud.url)
    assert cloud.only().points == points


def test_a_login_s_key_goes_to_the_login_s_host(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path / "log", api_host=cloud.url)
    job.log(range(3))
    job.finish()
    for name in ("SWANLAB_API_KEY", "SWANLAB_API_HOST", "SWANLAB_WEB_HOST"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path / "root"))
    (tmp_path / "root").mkdir()
    with SwanLabCloud() as other:
        netrc = tmp_path / "root" / ".netrc"
        netrc.write_text(f"machine {other.url} login {other.url} password {KEY}\n")
        with pytest.raises(SettingsError, match=f"is for {other.url}: say with --host"):
            sync(tmp_path / "log")
        with pytest.raises(CloudError, match="no API key"):
            sync(tmp_path / "log", api_host=cloud.url)  # the login was for the other one
        sync(tmp_path / "log", api_host=other.url)
        assert len(other.only().points) == 8


def test_a_server_that_sends_elsewhere_takes_no_key_along(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A redirection to another host carries neither the key nor the session."""
    job = Job(tmp_path)
    job.log(range(3))
    job.finish()
    with SwanLabCloud() as other:
        seen: list[str] = []

        def answer(method: str, path: str, body: Any, headers: Any) -> tuple[int, Any]:
            seen.append(str(headers))
            return 200, {"sid": "s", "expiredAt": "2099-01-01T00:00:00.0Z", "userInfo": {"username": "u", "name": "u"}}

        monkeypatch.setattr(other, "answer", answer)
        cloud.redirect = other.url
        with pytest.raises(CloudError):
            sync(tmp_path)
    assert seen
    assert not [headers for headers in seen if KEY in headers or "sid=" in headers.lower()]


def test_a_run_that_somebody_writes_is_only_ended_by_force(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, where its lock is not seen."""
    job = Job(tmp_path)
    job.log(range(3))
    job.finish()
    (journal,) = (tmp_path / "observer" / "r").glob("journal-*.log")
    alive = AtWork(journal, "node7", 4711, 20.0)
    monkeypatch.setattr(RunFiles, "at_work", property(lambda self: alive))
    cloud.experiments.clear()
    (synced,) = sync(tmp_path)
    assert cloud.only().points == expected(range(3))
    assert (cloud.only().state, synced.in_progress) == ("RUNNING", True)
    assert synced.notices == (
        "The run's end is left to who writes it, process 4711 on node7, whose last record is 20 s old; --force ends it "
        "here.",
    )
    (synced,) = sync(tmp_path, force=True)
    assert (cloud.only().state, synced.in_progress, synced.notices) == ("FINISHED", False, ())


def test_a_lone_spool_is_uploaded_and_what_is_missing_is_said(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No writer was ever there: of two ranks one has kept its part on its disk."""
    monkeypatch.setattr("swanlab_ray.observer.transport.channel.UNREACHABLE_S", 0.2)
    link = Link(Cluster(settings_for(tmp_path, mode="cloud")))
    link.cut = True
    observer = Observer(link.cluster.settings, Identity(0, 2, 0, 1), link)
    for step in range(20):
        observer.log({"x": step}, step)
    assert not observer.finish(timeout=1.0)
    assert not list(tmp_path.rglob("journal-*.log"))
    (synced,) = sync(tmp_path)
    assert cloud.only().points["x"] == {step: float(step) for step in range(20)}
    assert cloud.only().state == "CRASHED"
    assert "the run has no journal here" in cloud.only().logs[0]["message"]
    assert synced.notices == ("Of 2 ranks 1 are missing: give the paths of their files and journal as well.",)


def test_a_run_that_cannot_be_uploaded_costs_no_other(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One journal of several names a strange host."""
    for run_id, host in (("foreign", "http://127.0.0.1:9"), ("own", cloud.url)):
        job = Job(tmp_path / run_id, mode="offline", api_host=host, run_id=run_id)
        job.log(range(3))
        job.finish()
    monkeypatch.setenv("SWANLAB_API_HOST", "")
    monkeypatch.setenv("SWANLAB_WEB_HOST", "")
    monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path / "root"))
    monkeypatch.delenv("SWANLAB_API_KEY")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / ".netrc").write_text(f"machine {cloud.url} login {cloud.url} password {KEY}\n")
    shown = CliRunner().invoke(main, ["sync", str(tmp_path)])
    assert shown.exit_code == 1
    assert "Error: Run 'foreign' was in the cloud at 'http://127.0.0.1:9'" in shown.stderr
    assert shown.stdout.startswith("run own: ")
    assert list(cloud.experiments) == ["own"]


def test_sync_leaves_the_environment_as_it_is(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path)
    job.log(range(3))
    job.finish()
    for name, value in {"SWANLAB_MODE": "", "SWANLAB_RUN_ID": " ", "SWANLAB_PROJECT": "p"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    sync(tmp_path)
    assert dict(os.environ) == before


def test_sync_of_a_run_whose_head_is_damaged_asks_for_the_project(tmp_path: Path, cloud: SwanLabCloud) -> None:
    job = Job(tmp_path)
    job.log(range(3))
    job.finish()
    points = cloud.only().points
    (journal,) = (tmp_path / "observer" / "r").glob("journal-*.log")
    content = bytearray(journal.read_bytes())
    content[3] ^= 1
    journal.write_bytes(content)
    with pytest.raises(SettingsError, match="from its journal: name it with --project"):
        sync(tmp_path)
    cloud.experiments.clear()
    sync(tmp_path, project="p")
    assert cloud.only().points.keys() <= points.keys()
