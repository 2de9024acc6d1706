"""What Ray would do to a training process, and does not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from swanlab_ray.observer.history import archive
from swanlab_ray.observer.ray_cluster import ports as ports_here
from tests.conftest import Launch, SharedCluster, environment, run_forked
from tests.swanlab_file import ended_run, only_run

TRAIN = """
    import hashlib, os, sys, tempfile, time
    import psutil, torch

    def train(observer):
        torch.manual_seed(0)
        model = torch.nn.Linear(10, 10)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(50):
            loss = (model(torch.randn(4, 10)) ** 2).mean()
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            if observer:
                observer.log({"loss": loss}, step)
                if step in (5, 25):
                    observer.flush()
                    processes = psutil.process_iter(["cmdline"])
                    (keeper,) = [p for p in processes if observer.run_id in (p.info["cmdline"] or [""])[-1]]
                    for child in keeper.children(recursive=True):
                        if child.name() == {5: "raylet", 25: "gcs_server"}[step]:
                            child.kill()
            time.sleep(0.02)
        print("weights", hashlib.sha1(model.weight.detach().numpy().tobytes()).hexdigest())

    train(None)
    gone = tempfile.mkdtemp()
    os.chdir(gone)
    os.rmdir(gone)
    from swanlab_ray.observer import connect
    observer = connect()
    held, release = os.pipe()
    for _ in range(200):  # as a DataLoader does, whose workers live as long as the training
        if os.fork() == 0:
            os.close(release)
            os.read(held, 1)
            os._exit(0)
    assert observer.wait_ready(600)
    os.close(release)
    train(observer)
    print("finish", observer.finish())
    sys.exit(7)
"""


@pytest.mark.parametrize("ephemeral", ["32768 60999", "20002 65534", "1 65535", "", None])
def test_ports_of_ray_s_agents_are_nobody_else_s(
    ephemeral: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "range"
    monkeypatch.setattr(ports_here, "EPHEMERAL", file)
    if ephemeral is not None:
        file.write_text(ephemeral)
    ports = ports_here.free_ports(4)
    assert len(set(ports)) == 4
    if ephemeral == "32768 60999":
        assert not any(29_400 <= port < 29_600 or 32_768 <= port <= 60_999 for port in ports)


@pytest.mark.takes(20)
def test_losing_ray_does_not_change_the_training(launch: Launch, tmp_path: Path) -> None:
    """First the raylet is killed, then the GCS: same weights, same exit code, and finish() returns. Copies of the
    process that are made while the cluster starts do not hold it up, nor does a working directory that was removed."""
    done = launch(TRAIN, ranks=0, RAY_TMPDIR=str(tmp_path), OBSERVER_LOG_DIR=str(tmp_path / "swanlog")).wait()
    assert done.code == 7, done.output
    bare, observed = re.findall(r"^weights (\w+)$", done.output, re.M)
    assert bare == observed
    assert "finish" in done.output
    (run,) = archive.load(tmp_path / "swanlog")
    (account,) = run.accounts
    assert account.logged == account.written + account.spooled == 50


def test_sigterm_reaches_the_training_s_own_handler(launch: Launch, in_cluster: SharedCluster) -> None:
    """Ray would abort the process 3 s after SIGTERM; the handler that was there stays, also past these 3 s."""
    done = launch(
        """
        import os, signal, sys, time
        from swanlab_ray.observer import connect
        got = []
        signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
        hook = sys.excepthook
        with connect() as observer:
            assert observer.wait_ready(600)
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 4
            while time.monotonic() < deadline:
                time.sleep(0.1)
        assert sys.excepthook is hook
        print("got", got)
        """,
        ranks=0,
    ).wait()
    assert done.code == 0, done.output
    assert "got [15]" in done.output


def test_sigterm_without_a_handler_ends_the_process(launch: Launch, tmp_path: Path, in_cluster: SharedCluster) -> None:
    """As it would without us, by the signal, and a forked child at once; but the run knows, and has the last values.
    Whoever has taken Python's wakeup descriptor does not matter."""
    done = launch(
        """
        import multiprocessing, os, signal
        from swanlab_ray.observer import connect
        observer = connect()
        assert observer.wait_ready(600)
        child = multiprocessing.get_context("fork").Process(target=signal.pause)
        child.start()
        child.terminate()
        child.join(60)
        print("child", child.exitcode)
        signal.set_wakeup_fd(-1)
        for step in range(100):
            observer.log({"x": step}, step)
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            signal.pause()
        """,
        ranks=0,
    ).wait()
    assert done.code == -15
    assert "child -15" in done.output
    run = ended_run(tmp_path / "swanlog")
    assert len(run.scalars["x"]) == 100
    assert run.state == "aborted"
    assert "SIGTERM: the process was told to end" in run.error


def test_forked_dataloader_workers_log_nothing(tmp_path: Path, in_cluster: SharedCluster) -> None:
    """DataLoader workers inherit the observer; what they log is ignored, and their end does not end the run."""
    done = run_forked(
        """
        import torch
        from swanlab_ray.observer import connect
        observer = connect()
        assert observer.wait_ready(600)

        class Data(torch.utils.data.Dataset):
            def __len__(self):
                return 8
            def __getitem__(self, index):
                observer.log({"from_worker": 1.0})
                observer.finish("crashed", "a worker")
                return index

        for step, _ in enumerate(torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork")):
            observer.log({"x": step}, step)
        assert observer.finish()
        """,
        tmp_path,
        ranks=1,
    )
    assert done.code == 0, done.output
    run = only_run(tmp_path / "swanlog")
    assert run.scalars == {"x": {step: float(step) for step in range(8)}}
    assert run.state == "finished"


def test_unreachable_cluster_is_said_once(launch: Launch) -> None:
    """RAY_ADDRESS leads nowhere: one sentence with the address, the training goes on and ends by itself."""
    done = launch(
        """
        import time
        from swanlab_ray.observer import connect
        observer = connect()
        observer.log({"x": 1})
        while observer._channel.last_error is None:  # this machine may need long until it has tried once
            time.sleep(0.05)
        print("complete", observer.finish(timeout=3))
        """,
        ranks=0,
        RAY_ADDRESS="127.0.0.1:1",
    ).wait()
    assert done.code == 0
    assert done.output.count("RAY_ADDRESS='127.0.0.1:1' cannot be reached") == 2  # while it tries, and at the end
    assert "1 event of this rank did not reach the writer" in done.output
    assert "complete False" in done.output


def test_strict_raises_when_nobody_can_be_reached(launch: Launch) -> None:
    """Who asked for strictness gets an exception at the start, not an unobserved training."""
    done = launch(
        """
        from swanlab_ray.observer import connect
        connect(strict=True)
        print("not reached")
        """,
        ranks=0,
        RAY_ADDRESS="127.0.0.1:1",
    ).wait()
    assert done.code == 1
    assert "ConnectionError: The writer cannot be reached: The Ray cluster at RAY_ADDRESS='127.0.0.1:1'" in done.output
    assert "not reached" not in done.output


def test_ray_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from swanlab_ray.observer.ray_cluster import finding as cluster

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(cluster.NoCluster, match=r"^Ray is not installed: pip install 'ray>=2.50'\.$"):
        cluster.meant()


@pytest.mark.parametrize("closed", ["2", "1, 2", "0, 1, 2"])
def test_closed_standard_descriptors_are_no_socket_s(closed: str) -> None:
    code = f"""
import os, sys
for number in ({closed},): os.close(number)
from swanlab_ray.observer.script.descriptors import occupy_standard_descriptors
occupy_standard_descriptors()
assert all(os.readlink(f"/proc/self/fd/{{number}}") == "/dev/null" for number in ({closed},))
reader, writer = os.pipe()
assert reader > 2, reader
os._exit(7)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, env=environment()).returncode == 7


def test_a_process_without_standard_descriptors_reports(
    launch: Launch, tmp_path: Path, in_cluster: SharedCluster
) -> None:
    """As a daemon starts them, which has closed its own."""
    done = launch(
        """
        import os
        from swanlab_ray.observer import connect
        for number in (0, 1, 2):
            os.close(number)
        observer = connect()
        for step in range(20):
            observer.log({"x": step, "bad": None}, step)
        os._exit(0 if observer.finish() else 1)
        """,
        ranks=0,
        OBSERVER_LOG_DIR=str(tmp_path / "swanlog"),
    ).wait()
    assert done.code == 0
    (run,) = archive.load(tmp_path / "swanlog")
    assert (run.state, run.accounts[0].written) == ("success", 20)
