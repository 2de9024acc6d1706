from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# One tested way to run here: no hub, no telemetry, no auth on clusters that listen on this machine only.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    OMP_NUM_THREADS="1",
)


def environment() -> dict[str, str]:
    """What a user's process would inherit; SwanLab leaves variables of its own behind in this one."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SWANLAB_", "OBSERVER_"))}


for stray in os.environ.keys() - environment().keys():
    del os.environ[stray]

_CLUSTER = """
import ray, sys
context = ray.init(
    address="local", num_cpus=8, num_gpus=0, object_store_memory=100 << 20, log_to_driver=False, include_dashboard=True
)
print(context.address_info["gcs_address"], context.dashboard_url, context.address_info["session_dir"], flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class SharedCluster:
    address: str
    dashboard: str
    session_dir: Path


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[SharedCluster]:
    """One Ray cluster for all tests that do not harm it."""
    holder = subprocess.Popen(
        [sys.executable, "-c", _CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    address, dashboard, session_dir = holder.stdout.readline().split()
    yield SharedCluster(address, f"http://{dashboard}", Path(session_dir))
    holder.stdin.close()
    holder.wait(60)


@pytest.fixture
def in_cluster(ray_cluster: SharedCluster, monkeypatch: pytest.MonkeyPatch) -> SharedCluster:
    """Runs started by this test report to the shared cluster."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    return ray_cluster


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    code: int
    output: str


@dataclass
class Job:
    """A script under torchrun, or alone where ``ranks`` is 0."""

    process: subprocess.Popen[str]
    output_file: Path

    def wait(self, timeout: float = 120) -> Finished:
        code = self.process.wait(timeout)
        return Finished(code, self.output_file.read_text())

    def output(self) -> str:
        return self.output_file.read_text()


Launch = Callable[..., Job]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start a script in a directory of its own; its runs lie in ``tmp_path/swanlog``."""
    jobs: list[Job] = []

    def start(source: str, ranks: int = 1, torchrun: tuple[str, ...] = ("--standalone",), **env: str) -> Job:
        number = len(jobs)
        script = tmp_path / f"script{number}.py"
        script.write_text(textwrap.dedent(source))
        command = [sys.executable, str(script)]
        if ranks:
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                *torchrun,
                f"--nproc_per_node={ranks}",
                str(script),
            ]
        output = tmp_path / f"output{number}.txt"
        with open(output, "w") as file:
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                env=environment()
                | {"SWANLAB_PROJ_NAME": "test", "SWANLAB_MODE": "offline", "PYTHONUNBUFFERED": "1"}
                | env,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        jobs.append(Job(process, output))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()


def wait_until(condition: Callable[[], bool], timeout: float = 60, what: str = "condition") -> None:
    """Poll a condition with a deadline."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout} s"
        time.sleep(0.05)
