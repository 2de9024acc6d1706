"""Processes that a connected rank starts: which of them are its workers, and which are ranks."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import job_environment

SCRIPT = """
    import multiprocessing, os, sys, time
    from swanlab_ray.observer import connect
    from swanlab_ray.observer.script import workers
    how, what = sys.argv[1], sys.argv[2]

    def join(place):
        observer = connect()
        observer.log({"x": 1.0}, 0)
        print(place, type(observer).__name__, flush=True)
        observer.finish(timeout=0)

    def child():
        if what == "rank":
            os.environ.update(RANK="1", WORLD_SIZE="2", OBSERVER_RUN_ID="r")
        if what == "group":
            import torch.distributed as dist
            import torch.testing._internal.distributed.fake_pg
            dist.init_process_group("fake", rank=1, world_size=2, store=dist.HashStore())
            os.environ.update(OBSERVER_RUN_ID="r")
        join("child")
        if what == "nested":
            connect()
            nested = multiprocessing.get_context("spawn").Process(target=join, args=("nested",))
            nested.start()
            nested.join()

    if __name__ == "__main__":
        if what != "unconnected":
            workers.note()  # as connect() does in a rank
        process = multiprocessing.get_context(how).Process(target=child)
        process.start()
        process.join()
        assert process.exitcode == 0
        workers.forget_note()
        assert "OBSERVER_CONNECTED" not in os.environ
    elif what == "unguarded":
        join("import")
"""


def run(how: str, what: str, directory: Path) -> tuple[dict[str, str], str]:
    """Kinds of observers by where they were made, and what was said."""
    script = directory / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, script, how, what],
        capture_output=True,
        text=True,
        cwd=directory,
        timeout=120,
        env=job_environment({"RAY_ADDRESS": "127.0.0.1:1"}),  # who takes itself for a rank finds nobody
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines()), done.stderr


@pytest.mark.parametrize("how", ["spawn", "fork", "forkserver"])
def test_a_process_that_a_connected_rank_starts_is_its_worker(how: str, tmp_path: Path) -> None:
    """It is told when it logs, since nothing is lost silently, and leaves nothing behind."""
    made, said = run(how, "worker", tmp_path)
    assert made == {"child": "WorkerObserver"}
    assert said.count("a connected rank, so it counts as its worker and what it logs is not recorded") == 1
    assert not (tmp_path / "swanlog").exists()


def test_a_connect_that_nothing_guards_is_no_rank_in_a_spawned_worker(tmp_path: Path) -> None:
    """The script's first lines run in the worker before it knows its parent."""
    assert run("spawn", "unguarded", tmp_path)[0] == {"import": "WorkerObserver", "child": "WorkerObserver"}


def test_a_worker_s_own_processes_are_workers(tmp_path: Path) -> None:
    assert run("spawn", "nested", tmp_path)[0] == {"child": "WorkerObserver", "nested": "WorkerObserver"}


@pytest.mark.parametrize(
    ("how", "what"), [("spawn", "rank"), ("spawn", "group"), ("spawn", "unconnected"), ("fork", "rank")]
)
def test_ranks_that_a_process_starts_are_ranks(how: str, what: str, tmp_path: Path) -> None:
    """With a RANK of their own, with torch.distributed initialised, or of a parent that is no rank."""
    assert run(how, what, tmp_path)[0] == {"child": "Observer"}
