"""The examples of the docs, on two ranks; then SwanLab's file."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from swanlab_ray.actors.journal.records import Closed
from swanlab_ray.actors.runs.finding import RunFiles, find_runs
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.observer.cli import main
from tests.conftest import Launch, SharedCluster, run_forked, wait_until
from tests.incarnations import logged_in
from tests.swanlab_file import RunFile, ended_run

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def run_example(tmp_path: Path, name: str) -> RunFile:
    done = run_forked((EXAMPLES / name).read_text(), tmp_path, ranks=2)
    assert done.code == 0, done.output
    return ended_run(tmp_path / "swanlog")


@pytest.mark.parametrize("name", ["plain_torch.py", "accelerate_loop.py"])
def test_own_loops(tmp_path: Path, in_cluster: SharedCluster, name: str) -> None:
    run = run_example(tmp_path, name)
    check_losses(run, tmp_path / "swanlog", range(20))
    assert run.scalars["rank/0/loss"] != run.scalars["rank/1/loss"]
    assert run.config["learning_rate"] == 0.1
    if name == "accelerate_loop.py":
        assert run.scalars["lr"] == dict.fromkeys(range(20), 0.1)
    assert run.state == "finished"


def test_transformers_trainer(tmp_path: Path, in_cluster: SharedCluster) -> None:
    check_trainer(run_example(tmp_path, "transformers_trainer.py"), tmp_path / "swanlog")


@pytest.mark.takes(30)
def test_ray_train(launch: Launch, tmp_path: Path, in_cluster: SharedCluster) -> None:
    done = launch((EXAMPLES / "ray_train.py").read_text(), ranks=0).wait()
    assert done.code == 0, done.output
    check_trainer(ended_run(tmp_path / "swanlog"), tmp_path / "swanlog")


def check_losses(run: RunFile, log_dir: Path, steps: range) -> None:
    """Each rank's are in the journal; and in SwanLab's file, unless that was given less, and says so."""
    (files,) = find_runs([log_dir])
    logged = [(rank, step) for rank, step, values in logged_in(files) if "loss" in values]
    assert sorted(logged) == [(rank, step) for rank in range(2) for step in steps]
    if not thinned(files):
        assert all(set(run.scalars[f"rank/{rank}/loss"]) == set(steps) for rank in range(2))


def thinned(files: RunFiles) -> int:
    """What a slow machine's local mode could not take; the journal has it."""

    def closed() -> list[Closed]:
        return [entry for entry in merged(files) if isinstance(entry, Closed)]

    wait_until(lambda: len(closed()) > 0, 30, "the writer has noted the end, which comes after that of SwanLab's file")
    return closed()[0].thinned


def check_trainer(run: RunFile, log_dir: Path) -> None:
    check_losses(run, log_dir, range(1, 21))
    (files,) = find_runs([log_dir])
    assert len([step for _, step, values in logged_in(files) if "train/loss" in values]) == 20
    mean, shown = run.scalars["ranks/loss/mean"], run.scalars["train/loss"]
    both = mean.keys() & shown.keys()
    assert len(both) == 20 or (both and thinned(files))
    assert [mean[step] for step in both] == pytest.approx([shown[step] for step in both], abs=1e-3)
    assert run.state == "finished"


@pytest.mark.parametrize(("name", "text"), [("dpo.py", "chosen:  It is "), ("grpo.py", "reward/digits: ")])
def test_completions(tmp_path: Path, in_cluster: SharedCluster, name: str, text: str) -> None:
    run = run_example(tmp_path, name)
    (files,) = find_runs([tmp_path / "swanlog"])
    assert len([step for _, step, values in logged_in(files) if "train/loss" in values]) == 30
    assert len(run.scalars["train/loss"]) == 30 or thinned(files)
    for step in (1, 11, 21, 30):
        assert run.captions["rlhf_completions"][step] == [
            f"step {step} rank {rank}" for rank in range(2) for _ in range(4)
        ]
        assert all(found.startswith("prompt: What is ") for found in run.media["rlhf_completions"][step])
    shown = CliRunner().invoke(main, ["show", "--completions", "--log-dir", str(tmp_path / "swanlog")]).output
    assert "step 30, rank 0" in shown
    assert "step 30, rank 1" in shown
    assert text in shown
