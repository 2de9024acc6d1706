"""The command, as a user types it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import Launch, SharedCluster, environment, wait_until
from tests.swanlab_file import only_run

COMMAND = [str(Path(sys.executable).with_name("swanlab-ray"))]


def run(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=environment() | env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo", "--mode", "lokal"], "Invalid swanlab_mode: 'lokal'. Valid options: cloud, local, offline, disabled"),
        (["demo", "--mode", "disabled"], "--mode disabled makes no sense"),
        (["demo", "--project", ""], "swanlab_project cannot be an empty string."),
        (["demo", "--ranks", "0"], "0 is not in the range 1<=x<=64"),
        (["demo", "--steps", "many"], "'many' is not a valid integer"),
        (
            ["demo", "--log-dir", "/dev/null/x"],
            "log_dir '/dev/null/x' cannot be written (/dev/null is not a directory)",
        ),
        (["dmeo"], "No such command 'dmeo'"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], sentence: str) -> None:
    done = run(*arguments)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


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


def test_a_run_is_seen_in_the_terminal_and_in_the_dashboard(
    launch: Launch, tmp_path: Path, in_cluster: SharedCluster
) -> None:
    """``swanlab-ray status``, the actor's name, its repr, and its status line in the log tab's file."""
    job = launch(RUN_FOR_A_WHILE, ranks=2, OBSERVER_RUN_ID="seen", OBSERVER_RANK_SERIES="none")

    def statuses() -> list[dict[str, object]]:
        done = run("status", "seen", "--json")
        return json.loads(done.stdout) if done.returncode == 0 else []

    wait_until(lambda: any(len(one["ranks"]) == 2 and one["step"] for one in statuses()), 60)  # type: ignore[arg-type]
    (status,) = statuses()
    assert (status["state"], status["world_size"], status["max_steps"], status["loss"]) == ("running", 2, 10_000, 2.5)
    shown = run("status", "seen", COLUMNS="120").stdout
    assert re.search(r"running \| step \d+/10000 \| ranks 2/2 \| loss 2.5 \| events \d+", shown)

    # The name is what counts: the actor's state, its repr and its log are found by it, as in the dashboard's pages.
    actors = json.load(urllib.request.urlopen(f"{in_cluster.dashboard}/api/v0/actors?detail=1", timeout=30))
    (actor,) = [a for a in actors["data"]["result"]["result"] if a["name"] == "swanlab-writer:seen"]
    assert (actor["state"], actor["ray_namespace"]) == ("ALIVE", "swanlab-ray")
    assert actor["repr_name"] == "SwanLabWriter(project=test, run=seen)"
    assert not {"SWANLAB_API_KEY", "api_key"} & set(json.dumps(actor).split('"'))
    (log,) = (in_cluster.session_dir / "logs").glob(f"worker-*-{actor['pid']}.err")
    wait_until(lambda: bool(re.search(r"^running \| step \d+/10000 \| ranks 2/2 \| loss 2.5", log.read_text(), re.M)))

    (tmp_path / "stop").touch()
    assert job.wait().code == 0


def test_demo_ends_with_one_run(tmp_path: Path, in_cluster: SharedCluster) -> None:
    """The whole of ``swanlab-ray demo``, shorter: live lines, a table, one run that ended well, how to open it."""
    done = run("demo", "--steps", "6", "--mode", "offline", cwd=tmp_path, COLUMNS="100")
    assert done.returncode == 0, done.stdout + done.stderr
    run_file = only_run(tmp_path / "swanlog")
    assert set(run_file.scalars["rank/1/loss"]) == set(range(1, 7))
    assert run_file.values("train/loss")[-1] < run_file.values("train/loss")[0]
    assert run_file.state == "finished"
    assert re.search(r"│\s*1\s*│.*success", done.stdout)
    assert f"One run: {run_file.path}" in done.stdout
    assert re.search(rf"^Open it: \S*swanlab sync {run_file.path} --id demo-", done.stdout, re.M)


def test_demo_shows_what_went_wrong(tmp_path: Path, in_cluster: SharedCluster) -> None:
    """A training that cannot start: exit code, and the end of its log."""
    done = run("demo", "--steps", "3", cwd=tmp_path, PYTHONPATH=str(_broken_torch(tmp_path)))
    assert done.returncode != 0
    assert "The training failed (exit code" in done.stdout
    assert "broken on purpose" in done.stdout


def _broken_torch(tmp_path: Path) -> Path:
    """A directory whose ``sitecustomize`` breaks the ranks, and nothing else."""
    directory = tmp_path / "broken"
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(
        "import os\nif 'LOCAL_RANK' in os.environ: raise SystemExit('broken on purpose')\n"
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
    ]
    for name in observer.__all__:
        assert getattr(observer, name)
