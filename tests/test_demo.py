"""``swanlab-ray demo`` where something is odd, without its training: that is tried in test_cli."""

from __future__ import annotations

import io
import os
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.observer.cli import main
from swanlab_ray.observer.demo import run as demo
from tests.conftest import wait_until


@pytest.fixture
def stubborn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training that does not heed Ctrl-C; returns the file that it makes when it has begun, with its process id."""
    begun = tmp_path / "begun"
    script = tmp_path / "python [x]"
    script.write_text(
        f"#!/bin/sh\ntrap '' INT\necho $$ > {shlex.quote(str(begun))}\necho '\\377\\033[31m [/x]'\nsleep 600\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(demo, "meant", lambda: "somewhere")
    monkeypatch.setattr(demo, "END_S", 0.2)
    monkeypatch.setattr(demo, "_command", lambda name: name)  # as where the environment is activated
    return begun


def run(log_dir: Path, width: int = 1_000) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=width)
    code = demo.run_demo(ObserverSettings(project="p", mode="offline", log_dir=log_dir, run_id="r[1]"), 1, 5, console)
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def test_an_interrupt_ends_the_training_and_says_where_its_run_is(
    tmp_path: Path, stubborn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        wait_until(lambda: stubborn.exists() and stubborn.read_text() != "", 30)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_watch", interrupted)
    code, said = run(tmp_path / "my [runs]")
    assert code == 130
    option = f"--log-dir {shlex.quote(str(tmp_path / 'my [runs]'))}"
    assert f"Interrupted, and the training with it. What it has logged: swanlab-ray show 'r[1]' {option}" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(stubborn.read_text()), 0)


def test_the_end_of_a_failed_training_s_log_is_shown_whatever_is_in_it(
    tmp_path: Path, stubborn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(run_id: str, training: subprocess.Popen[str], console: Console) -> None:
        wait_until(lambda: "[/x]" in (tmp_path / "r[1].log").read_text("latin-1"), 30)
        os.killpg(training.pid, signal.SIGKILL)

    monkeypatch.setattr(demo, "_watch", failed)
    code, said = run(tmp_path)
    assert code == -9
    assert f"The training failed (exit code -9). The end of {tmp_path}/r[1].log:\n" in said
    assert "�␛[31m [/x]\n" in said


@pytest.mark.parametrize("project", ["a b", "[x]", "\x1b[31m", "x" * 101, "项目", ".."])
def test_an_odd_project_is_one_sentence(project: str) -> None:
    done = CliRunner().invoke(main, ["demo", "--project", project])
    assert done.exit_code == 2
    assert "\x1b" not in done.stderr


def test_a_log_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = CliRunner().invoke(main, ["demo", "--log-dir", str(tmp_path / "file" / "x")])
    assert done.exit_code == 2
    assert "is not a directory" in done.stderr


def test_an_address_where_nobody_answers_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://me:hunter2@there:1")
    done = CliRunner().invoke(main, ["demo", "--log-dir", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr == (
        "Error: RAY_ADDRESS='ray://***@there:1' is a Ray Client address; ranks need the cluster's HOST:6379.\n"
    )
