"""Real torchrun processes, real Ray, SwanLab's real file."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.conftest import Launch, SharedCluster, wait_until
from tests.swanlab_file import ended_run, only_run, read_run, run_dirs

LOG_200 = """
    from swanlab_ray.observer import connect
    observer = connect()
    for step in range(200):
        observer.log({"x": observer.rank * 1000 + step}, step=step)
    assert observer.finish()
    print("run", observer.run_id)
"""

WITH_ACCELERATE = """
    from accelerate import Accelerator
    from swanlab_ray.observer import ObserverTracker
    tracker = ObserverTracker()
    accelerator = Accelerator(log_with=tracker, cpu=True)
    accelerator.init_trackers("test")
    for step in range(200):
        tracker.observer.log({"x": accelerator.process_index * 1000 + step}, step=step)
    accelerator.end_training()
"""

FAIL_AT_5 = """
    import os, signal, sys, time
    from swanlab_ray.observer import connect
    observer = connect()
    assert observer.wait_ready(60)
    for step in range(1000):
        observer.log({"x": step}, step=step)
        if step == 5 and observer.rank == 1:
            observer.flush()
            FAIL
        time.sleep(0.05)
    observer.finish()
"""


@pytest.mark.parametrize("source", [LOG_200, WITH_ACCELERATE], ids=["connect", "accelerate"])
def test_every_rank_arrives_once_in_one_run(
    launch: Launch, tmp_path: Path, in_cluster: SharedCluster, source: str
) -> None:
    """200 points of each of 3 ranks, with the right values, in one run that ended well."""
    done = launch(source, ranks=3).wait()
    assert done.code == 0, done.output
    run = only_run(tmp_path / "swanlog")
    for rank in range(3):
        assert run.scalars[f"rank/{rank}/x"] == {step: rank * 1000 + step for step in range(200)}
    assert run.scalars["x"] == run.scalars["ranks/x/mean"] == {step: 1000 + step for step in range(200)}
    assert set(run.values("ranks/x/argmax")) == {2.0}
    assert run.state == "finished"


def test_ranks_start_a_cluster_of_their_own_and_end_it(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cluster the ranks start one among themselves; after the last goodbye nothing of it is left."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = launch(LOG_200, ranks=2, RAY_TMPDIR=str(tmp_path)).wait()
    assert done.code == 0, done.output
    run = only_run(tmp_path / "swanlog")
    assert run.scalars["rank/1/x"] == {step: 1000 + step for step in range(200)}
    (run_id,) = set(re.findall(r"^run (\S+)$", done.output, re.M))
    directory = Path(f"/tmp/swanlab-ray-{os.getuid()}") / run_id
    wait_until(lambda: not directory.exists(), what="the private cluster is gone")


def test_static_rendezvous_does_not_merge_jobs(launch: Launch, tmp_path: Path, in_cluster: SharedCluster) -> None:
    """Two jobs side by side, both called ``none`` by their static rendezvous, write two runs."""
    jobs = [launch(LOG_200, ranks=2, torchrun=(f"--master-port={port}",)) for port in (29611, 29612)]
    assert [job.wait().code for job in jobs] == [0, 0]
    runs = [read_run(directory) for directory in run_dirs(tmp_path / "swanlog")]
    assert len(runs) == 2
    for run in runs:
        assert len(run.scalars["rank/0/x"]) == len(run.scalars["rank/1/x"]) == 200
        assert run.state == "finished"


def test_exception_in_one_rank_is_the_run_s_error(launch: Launch, tmp_path: Path, in_cluster: SharedCluster) -> None:
    """The run ends crashed, and its error names the rank that raised, not the peers that torchrun ended."""
    job = launch(FAIL_AT_5.replace("FAIL", "raise ValueError('boom at 5')"), ranks=2)
    assert job.wait().code != 0
    run = ended_run(tmp_path / "swanlog")
    assert run.state == "crashed"
    assert run.error.startswith("rank 1 (")
    assert "ValueError: boom at 5" in run.error


def test_killed_rank_is_named(launch: Launch, tmp_path: Path, in_cluster: SharedCluster) -> None:
    """kill -9 of one rank: what it had acknowledged is there, and the run says that it was lost."""
    job = launch(FAIL_AT_5.replace("FAIL", "os.kill(os.getpid(), signal.SIGKILL)"), ranks=2)
    assert job.wait().code != 0
    run = ended_run(tmp_path / "swanlog")
    assert run.state == "crashed"
    assert re.match(r"rank \d .* was lost: its process is gone", run.error)
    assert set(range(6)) <= set(run.scalars["rank/1/x"])


@pytest.mark.parametrize(("action", "state"), [("sys.exit(3)", "crashed"), ("sys.exit(0)", "aborted")])
def test_leaving_early_is_no_success(
    launch: Launch, tmp_path: Path, in_cluster: SharedCluster, action: str, state: str
) -> None:
    """``sys.exit`` in the middle: the loop did not reach ``finish()``."""
    source = FAIL_AT_5.replace("observer.rank == 1", "True").replace("FAIL", action)
    launch(source, ranks=0).wait()
    assert only_run(tmp_path / "swanlog").state == state


def test_a_short_run_that_forgets_finish_is_still_a_run(
    launch: Launch, tmp_path: Path, in_cluster: SharedCluster
) -> None:
    """The interpreter is ending before the background connection is there."""
    done = launch(
        """
        from swanlab_ray.observer import connect
        observer = connect()
        for step in range(20):
            observer.log({"x": step}, step)
        """,
        ranks=0,
    ).wait()
    assert done.code == 0
    run = only_run(tmp_path / "swanlog")
    assert len(run.scalars["x"]) == 20
    assert run.state == "aborted"
    assert "ended: aborted, rank 0 (" in done.output
    assert str(run.path) in done.output


def test_ctrl_c_is_aborted(launch: Launch, tmp_path: Path, in_cluster: SharedCluster) -> None:
    """SIGINT to torchrun, as a terminal's Ctrl-C: the run ends aborted."""
    job = launch(FAIL_AT_5.replace("FAIL", "print('at five', flush=True)"), ranks=2)
    wait_until(lambda: "at five" in job.output())
    job.process.send_signal(signal.SIGINT)
    job.wait()
    run = ended_run(tmp_path / "swanlog")
    assert run.state == "aborted"
    assert "KeyboardInterrupt" in run.error
