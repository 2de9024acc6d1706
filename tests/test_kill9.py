"""SIGKILL for real, under real Ray: of the writer, of its node, of the whole cluster."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import swanlab
from click.testing import CliRunner, Result

from swanlab_ray.actors.wire.messages import ACTOR_PREFIX, NAMESPACE
from swanlab_ray.observer import connect
from swanlab_ray.observer.cli import main
from swanlab_ray.observer.history import archive
from swanlab_ray.observer.transport import flusher as flusher_module
from tests.conftest import Job, Launch, SharedCluster, wait_until
from tests.incarnations import Cluster, Link, logged_in, mortal, rank, settings_for
from tests.swanlab_cloud import SwanLabCloud
from tests.swanlab_file import only_run, run_dirs


def cli(*arguments: object, **env: str) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), env=env)


def writer_pid(run_id: str) -> int:
    """The pid of the living writer, once it answers."""
    found: list[int] = []

    def answers() -> bool:
        try:
            writer = ray.get_actor(ACTOR_PREFIX + run_id, NAMESPACE)
            found.append(ray.get(writer.status.remote(), timeout=10).pid)
        except (ray.exceptions.RayError, ValueError):
            return False
        return True

    wait_until(answers, 150, "a writer")
    return found[-1]


def test_the_writer_killed_at_random_moments(tmp_path: Path, in_cluster: SharedCluster) -> None:
    """Also twice in a row. One SwanLab run on disk at the end, with every point, once."""
    chance = random.Random(1)
    run_id = f"killed-{os.getpid()}"
    observer = connect(project="test", mode="offline", log_dir=tmp_path, run_id=run_id)
    assert observer.wait_ready(600)
    step = 0
    for kill in range(3):
        for _ in range(chance.randrange(200, 3000)):
            observer.log({"x": step, "y": -step}, step)
            step += 1
        if kill == 2:
            assert observer.flush(60)
        os.kill(writer_pid(run_id), signal.SIGKILL)
    for _ in range(500):
        observer.log({"x": step, "y": -step}, step)
        step += 1
    assert observer.flush(600)  # a new writer is there
    assert observer.finish()
    assert observer.outcome is not None
    assert observer.outcome.state == "success"
    run = only_run(tmp_path)  # fails where a point is there twice
    assert run.state == "finished"
    assert run.scalars["x"] == {n: float(n) for n in range(step)}
    assert run.scalars["y"] == {n: float(-n) for n in range(step)}
    (loaded,) = archive.load(tmp_path)
    assert sorted(logged_in(loaded.files)) == [(0, n, {"x": float(n), "y": float(-n)}) for n in range(step)]
    (account,) = loaded.accounts
    assert (account.logged, account.written, account.dropped) == (step, step, {})
    assert len(loaded.files.journals) >= 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_writer_killed_while_swanlab_opens_leaves_no_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mortal(monkeypatch, swanlab=True)
    monkeypatch.setattr(flusher_module, "RETRY_S", (0.01, 0.05))
    cluster = Cluster(settings_for(tmp_path))
    opened = threading.Event()
    init = swanlab.init

    def killed(settings: Any) -> None:
        monkeypatch.setattr(swanlab, "init", init)
        (settings.log_dir / settings.run.dir).mkdir()
        opened.set()
        raise SystemExit

    monkeypatch.setattr(swanlab, "init", killed)
    observer = rank(cluster, Link(cluster))
    observer.log({"x": 1.0}, 0)
    assert opened.wait(30)
    cluster.kill()
    observer.log({"x": 2.0}, 1)
    assert observer.finish()
    assert only_run(tmp_path).scalars["x"] == {0: 1.0, 1: 2.0}


@pytest.mark.takes(20)
def test_a_paused_writer(tmp_path: Path, in_cluster: SharedCluster) -> None:
    """Stopped for 20 s, as by a debugger or a swapping machine: everything arrives afterwards, once."""
    run_id = f"paused-{os.getpid()}"
    observer = connect(project="test", mode="offline", log_dir=tmp_path, run_id=run_id)
    observer.log({"x": 0}, 0)
    assert observer.flush(60)
    pid = writer_pid(run_id)
    os.kill(pid, signal.SIGSTOP)
    try:
        slowest, step, began = 0.0, 1, time.monotonic()
        while time.monotonic() - began < 20:
            before = time.perf_counter()
            observer.log({"x": step}, step)
            slowest = max(slowest, time.perf_counter() - before)
            step += 1
            time.sleep(0.002)  # the pace of a training
    finally:
        os.kill(pid, signal.SIGCONT)
    assert slowest < 5.0  # it did not wait for the writer
    assert observer.finish()
    run = only_run(tmp_path)
    assert run.scalars["x"] == {n: float(n) for n in range(step)}
    assert run.state == "finished"


NODE_LOST = """
    import json, os, sys, time
    from pathlib import Path
    os.environ.update(RAY_gcs_rpc_server_reconnect_timeout_s="1000000", RAY_health_check_period_ms="300",
                      RAY_health_check_failure_threshold="3", RAY_health_check_timeout_ms="1000")
    import ray
    from ray.cluster_utils import Cluster
    from swanlab_ray.actors.wire.messages import (ACTOR_PREFIX, NAMESPACE)
    from swanlab_ray.actors.settings import ObserverSettings
    from swanlab_ray.actors.writer.actor import Writer
    from swanlab_ray.actors.writer.handle import GROUPS
    from swanlab_ray.observer import connect
    from swanlab_ray.observer.ray_cluster.patches import be_patient

    be_patient()
    small = dict(num_cpus=1, object_store_memory=80 << 20)
    cluster = Cluster(initialize_head=True, head_node_args=small | {"include_dashboard": False})
    first = cluster.add_node(**small, resources={"writers": 1})
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
    settings = ObserverSettings()
    actor = ray.remote(concurrency_groups=GROUPS)(Writer).options(
        name=ACTOR_PREFIX + settings.run_id, namespace=NAMESPACE, lifetime="detached", num_cpus=0, max_restarts=-1,
        max_task_retries=0, resources={"writers": 0.001}).remote(settings.run_id, settings)
    observer = connect(settings)
    for step in range(500):
        observer.log({"x": step}, step)
    assert observer.flush(60)
    second = cluster.add_node(**small, resources={"writers": 1})
    cluster.remove_node(first, allow_graceful=False)
    step, deadline = 500, time.monotonic() + 200
    while observer.statistics().reconnections == 0:
        observer.log({"x": step}, step)
        step += 1
        time.sleep(0.01)  # the pace of a training
        assert time.monotonic() < deadline, "nobody took over"
    assert observer.finish(timeout=150)
    print("steps", step)
    ray.shutdown(); cluster.shutdown()
"""


def test_the_writer_s_node_is_lost(launch: Launch, tmp_path: Path) -> None:
    """Another node takes over; the journal lies on a disk that both see."""
    done = launch(NODE_LOST, ranks=0, OBSERVER_RUN_ID="moved", SWANLAB_LOG_DIR=str(tmp_path / "swanlog")).wait()
    assert done.code == 0, done.output
    steps = int(re.search(r"^steps (\d+)$", done.output, re.M)[1])  # type: ignore[index]
    run = only_run(tmp_path / "swanlog")
    assert run.scalars["x"] == {step: float(step) for step in range(steps)}
    assert run.state == "finished"


CLUSTER_LOST = """
    FOR_GOOD = False
    import os, sys, time, psutil
    from swanlab_ray.observer import connect
    from swanlab_ray.observer.agent import starting
    observer = connect()
    for step in range(100):
        observer.log({"x": step}, step)
    assert observer.flush(600)
    processes = psutil.process_iter(["cmdline"])
    (agent,) = [p for p in processes if (p.info["cmdline"] or [""])[-1].endswith("/" + observer.run_id)]
    if FOR_GOOD:
        starting.AGENT = "no.such.module"
    for process in [*agent.children(recursive=True), agent]:
        process.kill()
    for step in range(100, 300):
        observer.log({"x": step}, step)
    observer.finish()
    print("counts", observer.statistics())
"""


@pytest.mark.takes(20)
def test_a_whole_cluster_that_is_lost_costs_nothing(launch: Launch, tmp_path: Path) -> None:
    """With the agent, and the writer: the next agent starts another one, whose writer goes on with the journal."""
    done = launch(CLUSTER_LOST, ranks=0, OBSERVER_RUN_ID="back", RAY_TMPDIR=str(tmp_path)).wait()
    assert done.code == 0, done.output
    assert "logged=300, acknowledged=300, spooled=0, dropped={}" in done.output
    assert only_run(tmp_path / "swanlog").scalars["x"] == {step: float(step) for step in range(300)}


@pytest.mark.takes(30)
def test_the_whole_cluster_is_lost_and_sync_puts_it_together(launch: Launch, tmp_path: Path) -> None:
    """What the rank could not send is on its disk beside the journal; both together are the whole run."""
    for_good = CLUSTER_LOST.replace("FOR_GOOD = False", "FOR_GOOD = True")
    done = launch(for_good, ranks=0, OBSERVER_RUN_ID="lost", RAY_TMPDIR=str(tmp_path)).wait()
    assert done.code == 0, done.output
    assert "spooled=200" in done.output
    assert "200 events of this rank did not reach the writer" in done.output
    logs = tmp_path / "swanlog"
    assert cli("verify", logs).exit_code == 0
    shown = json.loads(cli("show", "lost", "--json", "--log-dir", logs).stdout)
    (rank,) = shown["ranks"]
    assert (rank["logged"], rank["written"], rank["spooled"]) == (300, 100, 200)
    assert shown["state"] == "success"  # as its one rank has put aside with its events
    with SwanLabCloud() as cloud:
        for _ in range(2):
            synced = cli("sync", logs, **cloud.environment())
            assert synced.exit_code == 0, synced.output
            assert cloud.only().points["x"] == {step: float(step) for step in range(300)}
        assert "0 scalars uploaded, 300 were there" in synced.stdout
        assert cloud.only().state == "FINISHED"
        assert cloud.only().repeated == 0


KILLED_WHOLE = """
    import os, time
    from swanlab_ray.observer import connect
    observer = connect()
    assert observer.wait_ready(600)
    begin = 0 if os.environ["PART"] == "first" else 50
    for step in range(begin, begin + 50):
        observer.log({"loss": observer.rank + 1 / (step + 1)}, step)
    assert observer.flush(600)
    print("flushed", flush=True)
    while begin == 0:
        time.sleep(1)  # until it is killed
    assert observer.finish()
"""


def test_everything_is_killed_at_once_and_requeued(launch: Launch, tmp_path: Path) -> None:
    """Ranks, writer and cluster go, as with their machine: show, verify and sync tell and keep what was acknowledged.
    A requeued job finds what the killed one has left behind, starts a cluster of its own, and goes on with the run."""
    run_id = f"killed-{os.getpid()}"
    env = {"RAY_TMPDIR": str(tmp_path), "OBSERVER_RUN_ID": run_id, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}

    def start(part: str) -> list[Job]:
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [launch(KILLED_WHOLE, ranks=0, PART=part, **env, **rank) for rank in ranks]

    killed = start("first")
    wait_until(lambda: all("flushed" in job.output() for job in killed), 600, "both ranks at work")
    (keeper,) = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[-1].endswith(f"/{run_id}")]
    for process in [*keeper.children(recursive=True), keeper, *(psutil.Process(job.process.pid) for job in killed)]:
        process.kill()
    assert [job.wait().code for job in killed] == [-signal.SIGKILL] * 2
    logs = tmp_path / "swanlog"
    wait_until(lambda: archive.load(logs)[0].state == "unfinished", 30)
    listed = json.loads(cli("runs", "--json", "--log-dir", logs).stdout)
    assert [(run["run_id"], run["state"]) for run in listed] == [(run_id, "unfinished")]
    assert f"test / {run_id} (offline): unfinished" in cli("show", run_id[:9], "--log-dir", logs).stdout
    verified = cli("verify", logs)
    assert verified.exit_code == 0, verified.stdout
    assert "the files tell of no end" in verified.stdout
    assert verified.stdout.splitlines()[-1] == "what is there is whole, but it may not be all: see above"

    def synced_twice(steps: int) -> None:
        with SwanLabCloud() as cloud:
            contents = []
            for _ in range(2):
                assert cli("sync", logs, **cloud.environment()).exit_code == 0
                contents.append(json.dumps(cloud.only().points, sort_keys=True))
            assert contents[0] == contents[1]
            assert set(cloud.only().points) >= {"loss", "ranks/loss/mean"}
            for rank in range(2):
                expected = {step: rank + 1 / (step + 1) for step in range(steps)}
                assert cloud.only().points[f"rank/{rank}/loss"] == expected

    synced_twice(50)
    for job in start("second"):
        done = job.wait()
        assert done.code == 0, done.output
    synced_twice(100)


def test_a_resumed_training_ends_with_one_run_on_disk(tmp_path: Path, in_cluster: SharedCluster) -> None:
    """SwanLab cannot reopen it, so it is written again: the first part, and from step 60 on the second."""
    run_id = f"resumed-{os.getpid()}"
    settings: dict[str, Any] = {"project": "test", "mode": "offline", "log_dir": tmp_path, "run_id": run_id}
    for steps, factor in ((range(100), 1.0), (range(60, 80), 10.0)):
        observer = connect(**settings)
        for step in steps:
            observer.log({"x": factor * step}, step)
        assert observer.finish()
    wait_until(lambda: len(run_dirs(tmp_path)) == 1)
    run = only_run(tmp_path)
    assert run.scalars["x"] == {step: float(step * (10 if step >= 60 else 1)) for step in range(80)}
    assert run.state == "finished"
