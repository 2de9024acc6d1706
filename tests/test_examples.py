"""The examples of the docs, run as a reader would: same commands, then SwanLab's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Launch, SharedCluster
from tests.swanlab_file import RunFile, ended_run

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def run_example(launch: Launch, tmp_path: Path, name: str, ranks: int) -> RunFile:
    source = (EXAMPLES / name).read_text()
    done = launch(source, ranks=ranks).wait(240)
    assert done.code == 0, done.output
    return ended_run(tmp_path / "swanlog")


@pytest.mark.parametrize("name", ["plain_torch.py", "accelerate_loop.py"])
def test_own_loops(launch: Launch, tmp_path: Path, in_cluster: SharedCluster, name: str) -> None:
    run = run_example(launch, tmp_path, name, ranks=2)
    for rank in range(2):
        assert set(run.scalars[f"rank/{rank}/loss"]) == set(range(20))
    assert run.scalars["rank/0/loss"] != run.scalars["rank/1/loss"]
    assert run.config["learning_rate"] == 0.1
    if name == "accelerate_loop.py":
        assert run.scalars["lr"] == dict.fromkeys(range(20), 0.1)
    assert run.state == "finished"


@pytest.mark.parametrize(("name", "ranks"), [("transformers_trainer.py", 2), ("ray_train.py", 0)])
def test_trainers(launch: Launch, tmp_path: Path, in_cluster: SharedCluster, name: str, ranks: int) -> None:
    run = run_example(launch, tmp_path, name, ranks)
    assert len(run.scalars["train/loss"]) == 20
    for rank in range(2):
        assert len(run.scalars[f"rank/{rank}/loss"]) == 20
    assert run.scalars["ranks/loss/mean"] == pytest.approx(run.scalars["train/loss"], abs=1e-3)
    assert run.state == "finished"


def test_plain_points_through_ray_train(launch: Launch, tmp_path: Path, in_cluster: SharedCluster) -> None:
    """The 200 points of each worker, with the right values and steps."""
    done = launch(
        """
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        def worker(config):
            from swanlab_ray.observer import connect
            with connect(project="p", mode="offline", log_dir=config["log_dir"]) as observer:
                for step in range(200):
                    observer.log({"x": observer.rank * 1000 + step}, step=step)

        import pathlib
        TorchTrainer(
            worker,
            train_loop_config={"log_dir": str(pathlib.Path("swanlog").resolve())},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=str(pathlib.Path("results").resolve())),
        ).fit()
        """,
        ranks=0,
    ).wait(240)
    assert done.code == 0, done.output
    run = ended_run(tmp_path / "swanlog")
    for rank in range(2):
        assert run.scalars[f"rank/{rank}/x"] == {step: rank * 1000 + step for step in range(200)}
    assert run.state == "finished"
