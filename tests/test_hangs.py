"""Real torchrun jobs that stand still, and what their group is told; and one that only takes long now and then."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from swanlab_ray.observer.history import archive
from tests.conftest import SLOWNESS, Launch, SharedCluster, wait_until
from tests.lark_bot import LarkGroup, texts
from tests.swanlab_file import ended_run

TIMEOUT = f"{10 * SLOWNESS:.0f}"
"""The ``hang_timeout``: above what makes a rank silent, and far above what a busy machine holds a step up for."""

SPIN_THEN_DEADLOCK = """
    import os, time
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from swanlab_ray.observer import connect

    dist.init_process_group("gloo")
    timeout = float(os.environ["OBSERVER_HANG_TIMEOUT"])
    observer = connect()
    assert observer.wait_ready(600)
    step = 0

    def train(seconds):
        global step
        more = torch.ones(1)
        until = time.monotonic() + seconds
        while more.item():
            if dist.get_rank() == 0 and time.monotonic() > until:
                more.zero_()
            dist.all_reduce(more, dist.ReduceOp.MIN)
            step += 1
            observer.log({"x": step}, step)
            time.sleep(0.02)

    def spin():
        while not Path("go on").exists():
            pass

    def wait_for_a_word_that_never_comes():
        dist.recv(torch.ones(1), 0)

    train(1.5 * timeout)  # some signs of life long, so that these were the first steps
    if dist.get_rank() == 1:
        spin()
    train(timeout)
    if dist.get_rank() == 1:
        wait_for_a_word_that_never_comes()
    dist.all_reduce(torch.ones(1))
"""


@pytest.mark.takes(60)
def test_a_spinning_rank_then_a_deadlock_then_the_end_of_the_job(
    launch: Launch, tmp_path: Path, in_cluster: SharedCluster
) -> None:
    """Each is told once, and by name; SIGTERM is known as what ended the job, though no rank could handle it."""
    with LarkGroup() as group:
        job = launch(SPIN_THEN_DEADLOCK, ranks=2, OBSERVER_HANG_TIMEOUT=TIMEOUT, **group.environment())

        def told(number: int) -> str:
            wait_until(lambda: len(group.cards) > number or job.process.poll() is not None, 400)
            assert job.process.poll() is None, job.output()
            return texts(group.cards[number])

        spinning = told(1)
        (tmp_path / "go on").touch()
        assert re.search(r"Rank 1 \(.*\) is behind: step \d+, at .*script0\.py:\d+ in spin[ .]", spinning)
        assert re.search(r"Rank 0 waits: step \d+, at .*script0\.py:\d+ in train \(distributed/", spinning)
        told(2)
        deadlock = told(3)
        assert re.search(r"Rank 0 waits: step \d+, at .*script0\.py:\d+ in <module> \(distributed/", deadlock)
        assert re.search(r"Rank 1 waits: step \d+, at .* in wait_for_a_word_that_never_comes \(distributed/", deadlock)
        os.kill(job.process.pid, signal.SIGTERM)
        job.wait()
        run = ended_run(tmp_path / "swanlog")
        wait_until(lambda: len(group.cards) > 4)
        assert group.titles() == [
            "Training started",
            "Training hangs",
            "Training moves again",
            "Training hangs",
            "Training aborted",
        ]
    assert run.state == "aborted"
    assert "SIGTERM" in run.error
    assert len(set(re.findall(r"No rank has made a step for .*", job.output()))) == 2
    (kept,) = archive.load(tmp_path / "swanlog")
    assert kept.state == "aborted"
    assert all(account.logged == account.written for account in kept.accounts)


LONG_NOW_AND_THEN = """
    import os, signal, time
    from pathlib import Path
    from swanlab_ray.observer import connect

    long = 1.6 * float(os.environ["OBSERVER_HANG_TIMEOUT"])
    observer = connect()
    assert observer.wait_ready(600)
    step = 0

    def meet():
        global step
        step += 1
        Path(f"{step}-{observer.rank}").touch()
        while not all(Path(f"{step}-{rank}").exists() for rank in range(observer.world_size)):
            time.sleep(0.01)
        observer.log({"x": step}, step)

    def train(steps, seconds):
        for _ in range(steps):
            with observer.span("data"):
                time.sleep(seconds)
            with observer.span("backward"):
                meet()

    time.sleep(long)  # the model is compiled
    train(200, 0.05)
    for phase in ("evaluate", "checkpoint"):
        with observer.span(phase):
            time.sleep(long)
        meet()
    print("nothing was wrong", flush=True)
    end = Path("end")  # the step after which both go on
    while not end.exists() or step < int(end.read_text()):
        if observer.rank == 0 and Path("go on").exists() and not end.exists():
            Path("end.new").write_text(str(step + 3))
            Path("end.new").rename(end)
        train(1, 2.0 if observer.rank == 1 else 0.05)
    if observer.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    meet()
    train(100, 0.05)  # for longer than it takes to be seen
    assert observer.finish()
"""


@pytest.mark.takes(140)
def test_what_takes_long_is_no_hang_but_a_slow_rank_and_a_stopped_one_are_told(
    launch: Launch, tmp_path: Path, in_cluster: SharedCluster
) -> None:
    with LarkGroup() as group:
        env = {"OBSERVER_HANG_TIMEOUT": TIMEOUT, "OBSERVER_RUN_ID": "long"} | group.environment()
        job = launch(LONG_NOW_AND_THEN, ranks=2, **env)
        wait_until(lambda: job.output().count("nothing was wrong") == 2 or job.process.poll() is not None, 400)
        assert group.titles() == ["Training started"], job.output()
        wait_until(lambda: len(group.cards) > 1, 300)
        assert "have been waiting for rank 1, data (" in texts(group.cards[1])
        (tmp_path / "go on").touch()
        wait_until(lambda: len(group.cards) > 2, 200)
        stopped = texts(group.cards[2])
        found = re.search(
            r"Rank 1 \(.*, pid (\d+)\) gives no sign of life: its process is stopped \(SIGSTOP, or a debugger\)\. "
            r"Rank 0 waits: step \d+, at .* in meet\.",
            stopped,
        )
        assert found, stopped
        os.kill(int(found[1]), signal.SIGCONT)
        assert job.wait().code == 0, job.output()
        wait_until(lambda: len(group.cards) > 4)
        assert group.titles() == [
            "Training started",
            "One rank slows down the others",
            "Training hangs",
            "Training moves again",
            "Training complete",
        ]
    assert ended_run(tmp_path / "swanlog").state == "finished"
