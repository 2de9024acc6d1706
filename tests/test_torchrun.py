"""Real torchrun processes, real Ray, SwanLab's real file."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from swanlab_ray.observer.history import archive
from tests.conftest import Launch, SharedCluster, wait_until
from tests.lark_bot import LarkGroup, texts
from tests.swanlab_file import ended_run, only_run

LOG_200 = """
    from swanlab_ray.observer import connect
    observer = connect()
    for step in range(200):
        observer.log({"x": observer.rank * 1000 + step}, step=step)
    assert observer.wait_ready(600)
    assert observer.finish()
    print("run", observer.run_id)
"""

FAIL_AT_5 = """
    import os, signal, sys, time
    from swanlab_ray.observer import connect
    observer = connect()
    assert observer.wait_ready(600)
    for step in range(1000):
        observer.log({"x": step}, step=step)
        if step == 5 and observer.rank == 1:
            observer.flush()
            FAIL
        time.sleep(0.05)
    observer.finish()
"""


def test_every_rank_arrives_once_in_one_run(launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 points of each of 3 ranks, with the right values, in one run that ended well; and two cards in the group.

    Without a cluster the ranks start one among themselves; after the last goodbye nothing of it is left.
    """
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with LarkGroup() as group:
        done = launch(LOG_200, ranks=3, RAY_TMPDIR=str(tmp_path), **group.environment()).wait()
        assert done.code == 0, done.output
        wait_until(lambda: len(group.cards) >= 2)
    assert group.titles() == ["Training started", "Training complete"]
    assert done.output.count("Registered Lark notification callback with HMAC authentication") == 1
    run = only_run(tmp_path / "swanlog")
    for rank in range(3):
        assert run.scalars[f"rank/{rank}/x"] == {step: rank * 1000 + step for step in range(200)}
    assert run.scalars["x"] == run.scalars["ranks/x/mean"] == {step: 1000 + step for step in range(200)}
    assert set(run.values("ranks/x/argmax")) == {2.0}
    assert run.state == "finished"
    (run_id,) = set(re.findall(r"^run (\S+)$", done.output, re.M))
    directory = Path(f"/tmp/swanlab-ray-{os.getuid()}") / run_id
    wait_until(lambda: not directory.exists(), what="the private cluster is gone")


def test_exception_in_one_rank_is_the_run_s_error(launch: Launch, tmp_path: Path, in_cluster: SharedCluster) -> None:
    """The run ends crashed, and its error names the rank that raised, not the peers that torchrun ended."""
    job = launch(FAIL_AT_5.replace("FAIL", "raise ValueError('boom at 5')"), ranks=2, OBSERVER_RUN_ID="boom")
    assert job.wait().code != 0
    run = ended_run(tmp_path / "swanlog")
    assert run.state == "crashed"
    assert run.error.startswith("rank 1 (")
    assert "ValueError: boom at 5" in run.error


def test_killed_rank_is_named(launch: Launch, tmp_path: Path, in_cluster: SharedCluster) -> None:
    """kill -9 of one rank: what it had acknowledged is there, and the run says that it was lost, as does its card."""
    with LarkGroup() as group:
        source = FAIL_AT_5.replace("FAIL", "os.kill(os.getpid(), signal.SIGKILL)")
        job = launch(source, ranks=2, OBSERVER_RUN_ID="killed", **group.environment())
        assert job.wait().code != 0
        run = ended_run(tmp_path / "swanlog")
        wait_until(lambda: "Training failed" in group.titles())
    assert group.titles()[0] == "Training started"
    assert group.titles().count("Training failed") == 1
    assert "was lost: its process is gone" in texts(group.cards[-1])
    assert run.state == "crashed"
    assert re.match(r"rank \d .* was lost: its process is gone", run.error)
    assert set(range(6)) <= set(run.scalars["rank/1/x"])


def test_leaving_early_is_no_success(launch: Launch, tmp_path: Path, in_cluster: SharedCluster) -> None:
    """``sys.exit(0)`` in the middle: the loop did not reach ``finish()``."""
    source = FAIL_AT_5.replace("observer.rank == 1", "True").replace("FAIL", "sys.exit(0)")
    launch(source, ranks=0).wait()
    assert only_run(tmp_path / "swanlog").state == "aborted"


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
    job = launch(FAIL_AT_5.replace("FAIL", "print('at five', flush=True)"), ranks=2, OBSERVER_RUN_ID="ctrl-c")
    wait_until(lambda: "at five" in job.output())
    job.process.send_signal(signal.SIGINT)
    job.wait()
    run = ended_run(tmp_path / "swanlog")
    assert run.state == "aborted"
    assert "KeyboardInterrupt" in run.error


def test_a_restart_by_torchrun_is_one_run(launch: Launch, tmp_path: Path, in_cluster: SharedCluster) -> None:
    """Rank 1 fails, torchrun starts all ranks again, and they go on: one run that ended well, with a note."""
    with LarkGroup() as group:
        job = launch(
            """
            import os, time
            from swanlab_ray.observer import connect
            observer = connect()
            assert observer.wait_ready(600)
            first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
            for step in range(0 if first else 4, 10):
                observer.log({"x": step if first else -step}, step)
                if first and step == 5 and observer.rank == 1:
                    raise ValueError("boom at 5")
                time.sleep(0.05)
            while first:
                time.sleep(1)  # until torchrun ends it
            assert observer.finish()
            """,
            ranks=2,
            torchrun=("--standalone", "--max-restarts=1"),
            **group.environment(),
        )
        assert job.wait().code == 0, job.output()
        wait_until(lambda: len(group.cards) >= 3)
    assert group.titles() == ["Training started", "Training restarted", "Training complete"]
    assert re.search(
        r"The training was started again, after rank 1 \(.*\): ValueError: boom at 5", texts(group.cards[1])
    )
    run = only_run(tmp_path / "swanlog")
    assert run.state == "finished"
    for rank in range(2):  # what was run again counts as it was run last
        assert run.scalars[f"rank/{rank}/x"] == {step: float(step if step < 4 else -step) for step in range(10)}


@pytest.mark.takes(15)
def test_a_retry_by_ray_train_is_one_run(launch: Launch, tmp_path: Path, in_cluster: SharedCluster) -> None:
    job = launch(
        """
        from pathlib import Path
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        def train(config):
            from swanlab_ray.observer import connect
            failed = Path(config["here"], "failed")
            first = not failed.exists()
            with connect(project="test", mode="offline", log_dir=config["here"]) as observer:
                assert observer.wait_ready(600)
                for step in range(0 if first else 4, 10):
                    observer.log({"x": step}, step)
                if first:
                    failed.touch()
                    raise ValueError("boom")

        DataParallelTrainer(
            train, train_loop_config={"here": str(Path.cwd())}, scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(storage_path=str(Path.cwd() / "ray"), failure_config=FailureConfig(max_failures=1)),
        ).fit()
        """,
        ranks=0,
    )
    assert job.wait().code == 0, job.output()
    run = ended_run(tmp_path)
    assert run.state == "finished"
    assert run.scalars["x"] == {step: float(step) for step in range(10)}
    (kept,) = archive.load(tmp_path)
    (note,) = [alert.text for alert in kept.summary.alerts if "started again" in alert.text]
    assert "ValueError: boom" in note
