"""The command, as a user types it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from swanlab_ray.observer.cli import main
from tests.conftest import Launch, SharedCluster, environment, wait_until
from tests.swanlab_file import only_run

COMMAND = [str(Path(sys.executable).with_name("swanlab-ray"))]


def run(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=cwd, env=environment() | env, **pipes) as process:
        try:
            stdout, stderr = process.communicate(timeout=1000)
        except subprocess.TimeoutExpired:
            for started in psutil.Process(process.pid).children(recursive=True):
                started.kill()
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo", "--mode", "lokal"], "Invalid swanlab_mode: 'lokal'. Valid options: cloud, local, offline, disabled"),
        (["demo", "--mode", "disabled"], "--mode disabled makes no sense"),
        (["demo", "--project", ""], "swanlab_project cannot be an empty string. Give the project a name"),
        (["verify", ""], "'' is no path: name a journal, a run's directory (swanlog/observer/RUN), or a log"),
        (["verify", "/nope"], "'/nope' does not exist: name a journal, a run's directory (swanlog/observer/RUN), or a"),
        (["sync", "demo-1"], "'demo-1' does not exist: name a journal, a run's directory (swanlog/observer/RUN), or a"),
        (["trace", "-o", ""], "Invalid value for '-o' / '--output': it is empty"),
        (["sync", ""], "'' is no path"),
        (["runs", "--log-dir", ""], "Invalid value for '--log-dir': it is empty"),
        (["sync", "--project", "", "."], "Invalid value for '--project': it is empty"),
        (["demo", "--ranks", "0"], "0 is not in the range 1<=x<=64"),
        (["demo", "--steps", "many"], "'many' is not a valid integer"),
        (
            ["demo", "--log-dir", "/dev/null/x"],
            "log_dir '/dev/null/x' cannot be written (/dev/null is not a directory)",
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], sentence: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code != 0
    assert sentence in done.stderr
    assert done.exception is None or isinstance(done.exception, SystemExit)


def test_status_of_nothing_says_so(tmp_path: Path) -> None:
    done = run("status", "no-such-run", RAY_TMPDIR=str(tmp_path))
    assert done.returncode != 0
    assert "No run 'no-such-run' is in progress on this machine" in done.stderr


def test_status_of_an_unreachable_cluster_says_so() -> None:
    done = run("status", RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode != 0
    assert "RAY_ADDRESS='127.0.0.1:1' cannot be reached" in done.stderr


RUN_FOR_A_WHILE = """
    import sys, time
    from pathlib import Path
    from swanlab_ray.observer import connect
    observer = connect()
    for step in range(10_000):
        observer.log({"loss": 2.5}, step=step)
        observer.progress(step, 10_000)
        if Path("stop").exists():
            break
        time.sleep(0.1)
    observer.finish()
"""


def test_the_command_is_installed() -> None:
    done = run("dmeo")
    assert done.returncode == 2
    assert "No such command 'dmeo'" in done.stderr


@pytest.mark.takes(20)
def test_a_run_is_seen_in_the_terminal_and_in_the_dashboard(
    launch: Launch, tmp_path: Path, dashboard: SharedCluster
) -> None:
    """``swanlab-ray status``, the actor's name, its repr, and its status line in the log tab's file."""
    # Two ranks as Slurm starts them.
    common = {"OBSERVER_RUN_ID": "seen", "OBSERVER_RANK_SERIES": "none", "WORLD_SIZE": "2"}
    jobs = [launch(RUN_FOR_A_WHILE, ranks=0, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]

    def statuses() -> list[dict[str, object]]:
        done = CliRunner().invoke(main, ["status", "seen", "--json"])
        return json.loads(done.stdout) if done.exit_code == 0 else []

    wait_until(lambda: any(len(one["ranks"]) == 2 and one["step"] for one in statuses()), 150)  # type: ignore[arg-type]
    (status,) = statuses()
    assert (status["state"], status["world_size"], status["max_steps"], status["loss"]) == ("running", 2, 10_000, 2.5)
    shown = run("status", "seen", COLUMNS="120").stdout
    assert re.search(r"running \| step \d+/10000 \| ranks 2/2 \| loss 2.5 \| events \d+", shown)

    # The name is what counts: the actor's state, its repr and its log are found by it, as in the dashboard's pages.
    actors = json.load(urllib.request.urlopen(f"{dashboard.dashboard}/api/v0/actors?detail=1", timeout=30))
    (actor,) = [a for a in actors["data"]["result"]["result"] if a["name"] == "swanlab-writer:seen"]
    assert (actor["state"], actor["ray_namespace"]) == ("ALIVE", "swanlab-ray")
    assert actor["repr_name"] == "SwanLabWriter(project=test, run=seen)"
    assert not {"SWANLAB_API_KEY", "api_key"} & set(json.dumps(actor).split('"'))
    (log,) = (dashboard.session_dir / "logs").glob(f"worker-*-{actor['pid']}.err")
    wait_until(lambda: bool(re.search(r"^running \| step \d+/10000 \| ranks 2/2 \| loss 2.5", log.read_text(), re.M)))

    (tmp_path / "stop").touch()
    for job in jobs:
        assert job.wait().code == 0


@pytest.mark.takes(20)
def test_demo_ends_with_one_run(tmp_path: Path, in_cluster: SharedCluster) -> None:
    """The whole of ``swanlab-ray demo``, shorter: live lines, a table, one run that ended well, how to open it; and
    where the time went, with the rank that is slow on purpose."""
    steps = set(range(1, 9))
    done = run("demo", "--steps", "8", "--mode", "offline", "--slow-rank", "1", cwd=tmp_path, COLUMNS="100")
    assert done.returncode == 0, done.stdout + done.stderr
    run_file = only_run(tmp_path / "swanlog")
    assert set(run_file.scalars["rank/1/loss"]) == steps
    assert run_file.values("train/loss")[-1] < run_file.values("train/loss")[0]
    assert run_file.state == "finished"
    assert re.search(r"│\s*1\s*│.*success", done.stdout)
    assert f"One run: {run_file.path}" in done.stdout
    assert re.search(r"^Open it: \S*swanlab-ray sync swanlog/observer/demo-\S+$", done.stdout, re.M)
    (shown,) = re.findall(r"^What became of every event: \S*swanlab-ray show (\S+)$", done.stdout, re.M)
    logs = ["--log-dir", str(tmp_path / "swanlog")]
    assert "SwanLab (complete)" in CliRunner().invoke(main, ["show", shown, *logs]).stdout
    for phase in ("data", "forward", "backward", "optimizer"):
        assert set(run_file.scalars[f"profiling/{phase}"]) == steps
        assert set(run_file.scalars[f"ranks/profiling/{phase}/argmax"]) == steps
    assert run_file.values("ranks/profiling/data/argmax").count(1.0) > 4
    assert run_file.values("ranks/straggler").count(1.0) > 4
    assert "Straggler: rank 1, data" in done.stdout
    phases = json.loads(CliRunner().invoke(main, ["show", "--phases", "--json", *logs]).stdout)
    blamed = [(one["straggler"], one["phase"]) for one in phases]
    assert blamed.count((1, "data")) > 4
    traced = CliRunner().invoke(main, ["trace", "-o", str(tmp_path / "trace.json"), *logs])
    assert traced.exit_code == 0, traced.output
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    data = {
        pid: sum(event["dur"] for event in events if (event["name"], event["pid"]) == ("data", pid)) for pid in (0, 1)
    }
    assert data[1] > 8 * 500_000
    assert data[1] > 2 * data[0]


def test_demo_shows_what_went_wrong(tmp_path: Path, in_cluster: SharedCluster) -> None:
    """A training that cannot start: exit code, and the end of its log."""
    done = run("demo", "--steps", "3", cwd=tmp_path, PYTHONPATH=str(_broken_torch(tmp_path)))
    assert done.returncode != 0
    assert "The training failed (exit code" in done.stdout
    assert "broken on purpose" in done.stdout


def _broken_torch(tmp_path: Path) -> Path:
    """A directory whose ``sitecustomize`` breaks torchrun, and nothing else."""
    directory = tmp_path / "broken"
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(
        "import sys\nif 'torch.distributed.run' in sys.orig_argv: raise SystemExit('broken on purpose')\n"
    )
    return directory


def test_import_is_cheap() -> None:
    """Neither Ray nor torch; the time is the benchmark's matter."""
    code = "import sys, swanlab_ray.observer; print(sorted({'ray', 'torch', 'swanlab', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    light = (
        "import sys; from swanlab_ray.observer import connect, ObserverSettings; "
        "print(sorted({'ray', 'torch', 'swanlab'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_public_names() -> None:
    import swanlab_ray.observer as observer

    assert observer.__all__ == [
        "Observer",
        "ObserverCallback",
        "ObserverSettings",
        "ObserverTracker",
        "SettingsError",
        "connect",
        "current",
        "sync",
    ]
    for name in observer.__all__:
        assert getattr(observer, name)
