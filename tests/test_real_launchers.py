"""The launchers that people start trainings with, for real: one run, and every rank is in it once."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

from swanlab_ray.actors.journal.records import Arrived
from swanlab_ray.actors.runs.finding import RunFiles, find_runs
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.observer.ray_cluster.ports import free_ports
from tests.conftest import SLOWNESS, SharedCluster, environment
from tests.incarnations import logged_in
from tests.overlays import ROOT, path_with

BY_ITSELF = """
from swanlab_ray.observer import connect
with connect(project="p", mode="offline") as observer:
    for step in range(3):
        observer.log({"loss": 10 * observer.rank + step}, step)
"""

IN_A_GROUP = f"""
import torch.distributed as dist
dist.init_process_group("gloo")
{BY_ITSELF}
dist.destroy_process_group()
"""

SPAWN = f"""
import os
import torch.distributed as dist
import torch.multiprocessing

def train(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{{file}}", rank=rank, world_size=2)
{indent(BY_ITSELF, "    ")}
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(train, (os.path.abspath("rendezvous"),), nprocs=2)
"""

LIGHTNING = """
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from swanlab_ray.observer import connect

class Observed(Callback):
    def on_fit_start(self, trainer, model):
        self.observer = connect(project="p", mode="offline")

    def on_train_batch_end(self, trainer, model, outputs, batch, index):
        self.observer.log({"loss": 10 * trainer.global_rank + index}, index)

    def on_fit_end(self, trainer, model):
        self.observer.finish()

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, index):
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(6, 2)))
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, callbacks=[Observed()], **quiet).fit(Model(), rows)
"""

CELL = """
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel()
for _ in range({times}):
    assert client.execute_interactive({code!r})["content"]["status"] == "ok"
client.stop_channels()
manager.shutdown_kernel()
"""
NOTEBOOK = CELL.format(times=2, code=BY_ITSELF)  # the same cell once more is a second run
NOTEBOOK_LAUNCHER = CELL.format(
    times=1,
    code=f"""
import accelerate
def train():
{indent(BY_ITSELF, "    ")}
accelerate.notebook_launcher(train, num_processes=2)
""",
)


def python(module: str, *options: str) -> list[str]:
    return [sys.executable, "-m", module, *options]


ACCELERATE = python(
    "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
    "--dynamo_backend=no", "--main_process_port=0",
)  # fmt: skip
# What `deepspeed` runs on each machine, by ssh, pdsh or as its own child.
DEEPSPEED = python("deepspeed.launcher.launch", "--world_info=eyJsb2NhbGhvc3QiOiBbMCwgMV19", "--master_port={port}")
# MPICH and Intel MPI leave it to the script to tell torch.distributed about ranks.
HYDRA = [
    str(ROOT / "build" / "launchers" / "bin" / "mpiexec.hydra"),
    "-n",
    "2",
    "env",
    "MASTER_ADDR=127.0.0.1",
    "MASTER_PORT={port}",
    "WORLD_SIZE=2",
]
MPIRUN = [str(Path(sys.executable).parent / "mpirun"), "--oversubscribe", "-n", "2", sys.executable]


@pytest.mark.parametrize(
    ("command", "script", "runs"),
    [
        (ACCELERATE, BY_ITSELF, 1),
        (DEEPSPEED, IN_A_GROUP, 1),
        (MPIRUN, BY_ITSELF, 1),
        ([*HYDRA, "sh", "-c", 'RANK=$PMI_RANK exec "$0" "$@"', sys.executable], IN_A_GROUP, 1),
        ([sys.executable], SPAWN, 1),
        ([sys.executable], LIGHTNING, 1),
        ([sys.executable], NOTEBOOK, 2),
        ([sys.executable], NOTEBOOK_LAUNCHER, 1),
    ],
    ids=["accelerate", "deepspeed", "mpirun", "hydra", "spawn", "lightning", "notebook", "notebook_launcher"],
)
def test_every_rank_is_in_the_one_run(
    command: list[str], script: str, runs: int, tmp_path: Path, in_cluster: SharedCluster
) -> None:
    (port,) = free_ports(1)
    started(tmp_path, script, [*(part.format(port=port) for part in command), "script.py"])
    found = find_runs([tmp_path / "swanlog"])
    assert len(found) == runs
    for run in found:
        check(run, range(2 // runs))


def test_a_job_that_was_submitted_to_ray(tmp_path: Path, dashboard: SharedCluster) -> None:
    """Its working directory is Ray's, so it is told where the run shall lie."""
    variables = json.dumps({"env_vars": {"OBSERVER_LOG_DIR": str(tmp_path / "swanlog")}})
    ray = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", dashboard.dashboard]
    entrypoint = python("torch.distributed.run", "--standalone", "--nproc_per_node=2", f"{tmp_path}/script.py")
    started(tmp_path, BY_ITSELF, [*ray, f"--runtime-env-json={variables}", "--", *entrypoint])
    (run,) = find_runs([tmp_path / "swanlog"])
    check(run, range(2))


def test_all_ranks_of_a_job_in_a_cluster(tmp_path: Path, in_cluster: SharedCluster) -> None:
    """Each tells what it sees, the first of a machine looks at that, and the last one to end tells of all."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "swanlab_ray.observer.cli", "doctor"],
        env=environment() | {"SWANLAB_MODE": "offline", "RAY_ADDRESS": in_cluster.address},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.partition("  ")[2] for line in done.stdout.splitlines()]
    assert len([line for line in lines if line.startswith("ok     trial run: the writer answered after ")]) == 2
    assert f"ok     Ray: the cluster at {in_cluster.address} works" in lines
    assert [line for line in lines if line.startswith("ok     head: swanlab-ray ")]
    host = socket.gethostname()
    assert f"ok     all ranks: 2 ranks on 1 machine ({host}) in one run" in lines
    assert not (tmp_path / "swanlog").exists()


def check(run: RunFiles, ranks: range) -> None:
    assert sorted((rank, step, values["loss"]) for rank, step, values in logged_in(run)) == [
        (rank, step, 10 * rank + step) for rank in ranks for step in range(3)
    ]
    arrived = [entry for entry in merged(run) if isinstance(entry, Arrived)]
    places = {(one.rank, one.world_size, one.local_rank) for one in arrived}
    assert places == {(rank, len(ranks), rank) for rank in ranks}


def started(tmp_path: Path, script: str, command: list[str]) -> None:
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment()
        | {
            "PYTHONPATH": path_with("launchers"),
            "DS_ACCELERATOR": "cpu",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300 * SLOWNESS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
