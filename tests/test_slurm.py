"""The batch scripts people copy, on a real Slurm: one that the tests start, whose two nodes are this machine."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from swanlab_ray.actors.journal.records import Arrived
from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.runs.merging import merged
from tests import cluster_shell
from tests.cluster_files import CONFIGS
from tests.conftest import SharedCluster, job_environment, wait_until
from tests.incarnations import logged_in
from tests.slurm import HOST, Slurm
from tests.swanlab_file import ended_run

SCRIPTS = sorted((CONFIGS / "slurm").iterdir())
TRAIN = """
from swanlab_ray.observer import connect

with connect() as observer:
    for step in range(20):
        observer.log({"loss": step + observer.rank}, step)
"""

UNTIL_RAY_IS_CALLED = """
noted=0
until ((noted >= 4)); do
  sleep 0.1
  noted=0
  for call in "$CALLS"/*; do if [[ -s $call ]]; then noted=$((noted + 1)); fi; done
done
"""
"""Slurm ends all else with the program, perhaps before it has begun."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    one = Slurm(tmp_path_factory.mktemp("slurm"))
    yield one
    one.end()


def test_slurm_would_take_each_and_nothing_misspelt(slurm: Slurm, tmp_path: Path) -> None:
    """One test, since each of pytest's workers starts a Slurm of its own."""
    for script in SCRIPTS:
        asked = slurm.run("sbatch", "--test-only", str(script))
        assert asked.returncode == 0, asked.stderr
        assert "using 64 processors on nodes" in asked.stderr
        for right, wrong in (("--gpus-per-node", "--gpu-per-nodes"), ("--nodes=2", "--nodes=two")):
            mutant = tmp_path / script.name
            mutant.write_text(script.read_text().replace(right, wrong))
            assert slurm.run("sbatch", "--test-only", str(mutant)).returncode != 0, (script, wrong)


def test_each_runs_as_it_is(slurm: Slurm, tmp_path: Path) -> None:
    """On two nodes of eight GPUs, where the programs only note how they are called. What pyxis adds to ``srun`` is
    noted as well, and taken away."""
    programs = tmp_path / "programs"
    programs.mkdir()
    cluster_shell.put_stubs(programs, "torchrun", "ray", "axolotl", "python")
    with open(programs / "python", "a") as python:
        python.write(UNTIL_RAY_IS_CALLED)
    (programs / "srun").write_text(
        '#!/bin/bash\nfor option in "$@"; do [[ $option == --container-* ]] || set -- "$@" "$option"; shift; done\n'
        'exec /usr/bin/srun "$@"\n'
    )
    (programs / "srun").chmod(0o755)
    jobs = {}
    for script in SCRIPTS:
        noted = tmp_path / script.stem
        noted.mkdir()
        env = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(noted), "IMAGE": "/image.sqsh"}
        arguments = ("config.yaml",) if script.stem == "axolotl" else cluster_shell.PROGRAM
        jobs[script] = slurm.submit(tmp_path, str(script), *arguments, env=env)
    for script, job in jobs.items():
        assert slurm.wait(job) == "COMPLETED", (tmp_path / f"{script.stem}-{job}.log").read_text()
        calls = cluster_shell.noted_calls(tmp_path / script.stem)
        for call in calls:
            cluster_shell.check(call)
        programs_called = sorted(call.program for call in calls)
        assert (
            programs_called
            == {
                "axolotl": ["axolotl"] * 3,
                "train": ["torchrun"] * 2,
                "train_in_container": ["torchrun"] * 2,
                "train_on_ray": ["python", "ray", "ray", "ray"],
            }[script.stem]
        ), (script, calls)


@pytest.mark.takes(15)
def test_a_job_is_one_run(slurm: Slurm, tmp_path: Path) -> None:
    """Really: two ranks under torchrun on one node, with nothing set but the project."""
    (tmp_path / "train.py").write_text(TRAIN)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as rays:
        smaller = ("--nodes=1", f"--nodelist={HOST}", "--gpus-per-node=2", "--cpus-per-task=2")
        env = job_environment({"RAY_TMPDIR": rays, "PATH": f"{cluster_shell.BIN}:{os.environ['PATH']}"})
        job = slurm.submit(tmp_path, *smaller, str(CONFIGS / "slurm" / "train.sbatch"), "train.py", env=env)
        assert slurm.wait(job) == "COMPLETED", (tmp_path / f"train-{job}.log").read_text()
        directory = Path(f"/tmp/swanlab-ray-{os.getuid()}") / f"slurm-{job}"
        wait_until(lambda: not directory.exists(), what="the run's own cluster is gone")
    run = ended_run(tmp_path / "swanlog")
    assert run.state == "finished"
    assert [run.scalars[f"rank/{rank}/loss"][19] for rank in range(2)] == [19, 20]
    (files,) = find_runs([tmp_path / "swanlog"])
    assert files.run_id == f"slurm-{job}"
    assert sorted((rank, step) for rank, step, _ in logged_in(files)) == [(r, s) for r in range(2) for s in range(20)]


@pytest.mark.takes(15)
def test_ranks_that_srun_starts_are_one_run(slurm: Slurm, tmp_path: Path, in_cluster: SharedCluster) -> None:
    """Without torchrun and torch.distributed: Slurm tells rank, size and the run's name."""
    (tmp_path / "train.py").write_text(TRAIN)
    called = ("srun", "--nodes=1", "--ntasks=2", sys.executable, "train.py")
    done = slurm.run(*called, env=job_environment({"RAY_ADDRESS": in_cluster.address}), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = find_runs([tmp_path / "swanlog"])
    assert re.fullmatch(r"slurm-test-\d+\.0", run.run_id)
    assert sorted({rank for rank, _, _ in logged_in(run)}) == [0, 1]
    arrived = {(one.rank, one.local_rank) for one in merged(run) if isinstance(one, Arrived)}
    assert arrived == {(0, 0), (1, 1)}
