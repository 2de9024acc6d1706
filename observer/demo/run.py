"""``swanlab-ray demo``: a real distributed training under torchrun, watched from here."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import click
from rich.console import Console
from rich.live import Live

from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.settings import LOG_DIR_VARIABLES, ObserverSettings
from swanlab_ray.actors.wire.naming import absolute
from swanlab_ray.actors.wire.status import WriterStatus, status_line
from swanlab_ray.actors.wire.text import many
from swanlab_ray.observer.agent.starting import Agent
from swanlab_ray.observer.history.breakdown import breakdown, phases_table
from swanlab_ray.observer.job.identity import fresh_run_id
from swanlab_ray.observer.looking.render import say
from swanlab_ray.observer.looking.watch import Watcher, rank_table
from swanlab_ray.observer.ray_cluster.finding import NoCluster, meant

POLL_S = 0.5
PLAIN_LINE_S = 3.0
"""Seconds between two lines where the output is no terminal."""
END_S = 60.0
"""Seconds that the training has to end after an interrupt."""
INTERRUPTED = 130
"""Exit code, as of what a shell sees ended by SIGINT."""


def run_demo(settings: ObserverSettings, ranks: int, steps: int, console: Console, slow_rank: int | None = None) -> int:
    """Train and watch; returns the exit code. The data loading of ``slow_rank`` sleeps, so that it is named.

    Raises:
        click.ClickException: something it needs is not installed, or the log directory cannot be made.
    """
    for module in ("torch", "transformers", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise click.ClickException(
                f"The demo needs {module}, which is missing: install swanlab-ray with its extra [demo], such as pip "
                "install '.[demo]' in a checkout."
            )
    run_id = settings.run_id or fresh_run_id("demo")
    _make_directory(settings.log_dir)
    log_path = settings.log_dir / f"{run_id}.log"
    say(console, f"Training a small Llama: {many(ranks, 'rank')}, {many(steps, 'step')}, run {run_id}.")
    say(console, "Starting torchrun, its ranks and a Ray cluster (about 20 s) ...")
    if meant() is None:
        Agent(run_id, settings.dashboard).begin()  # while torch is being imported
    ours = _command("swanlab-ray")
    show = f"{ours} show {shlex.quote(run_id)}{_log_dir_option(settings.log_dir)}"
    try:
        with open(log_path, "w") as log, _torchrun(settings, run_id, ranks, steps, slow_rank, log) as training:
            last = _watch(run_id, training, console)
            code = training.wait()
    except KeyboardInterrupt:
        say(console, f"Interrupted, and the training with it. What it has logged: {show}")
        return INTERRUPTED
    if code:
        say(console, f"The training failed (exit code {code}). The end of {log_path}:", "red")
        for line in log_path.read_text("utf-8", "replace").splitlines()[-60:]:
            say(console, line)
        return code
    if last is None or not last.closed:
        say(console, f"The run was not seen to its end; see {log_path}.", "red")
        return 1
    console.print(rank_table(last))
    for notice in last.notices:
        say(console, notice)
    _show_phases(Path(last.journal), console)
    say(console, f"One run: {last.url or last.run_dir or last.journal}")
    say(console, f"Open it: {_open_command(last, settings)}")
    say(console, f"What became of every event: {show}")
    say(console, f"The timeline of all ranks: {show.replace(f'{ours} show', f'{ours} trace', 1)}")
    return 0 if last.state == "success" else 1


def _make_directory(log_dir: Path) -> None:
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"The log directory cannot be made: {error}.") from None


@contextmanager
def _torchrun(
    settings: ObserverSettings, run_id: str, ranks: int, steps: int, slow_rank: int | None, log: IO[str]
) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {
        "OBSERVER_RUN_ID": run_id,
        "OBSERVER_LOG_DIR": str(settings.log_dir),
        "SWANLAB_PROJ_NAME": settings.project or "",
        "SWANLAB_MODE": settings.mode,
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", "swanlab_ray.observer.demo.training", str(steps)]
    command += [] if slow_rank is None else [str(slow_rank)]
    training = subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True)
    try:
        yield training
    finally:
        if training.poll() is None:
            training.send_signal(signal.SIGINT)
            try:
                training.wait(END_S)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):  # it does not end, or the user does not wait for it
                os.killpg(training.pid, signal.SIGKILL)
                training.wait()


def _watch(run_id: str, training: subprocess.Popen[str], console: Console) -> WriterStatus | None:
    """Show the run until it is closed or the training has failed; returns the last status that was seen."""
    watcher: Watcher | None = None
    last: WriterStatus | None = None
    next_line = 0.0
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while not (last and last.closed):
            running = training.poll() is None
            try:
                watcher = watcher or Watcher(run_id)
                statuses = watcher.statuses()
            except NoCluster:
                statuses = []
            if statuses:
                last = statuses[0]
                live.update(rank_table(last), refresh=console.is_terminal)
                if not console.is_terminal and time.monotonic() >= next_line:
                    say(console, status_line(last))
                    next_line = time.monotonic() + PLAIN_LINE_S
            elif not running:
                break
            time.sleep(POLL_S)
    if watcher is not None:
        watcher.close()
    return last


def _show_phases(journal: Path, console: Console) -> None:
    """Where the time went, where the journal is within reach."""
    if not journal.is_dir():
        return
    found = breakdown(find_runs([journal])[-1])
    if found.steps:
        say(console, "Where the time of a step went (mean):")
        console.print(phases_table(found.steps))
    if found.straggler is not None:
        say(console, f"Straggler: {found.straggler}", "yellow")


def _open_command(status: WriterStatus, settings: ObserverSettings) -> str:
    if status.url:
        return status.url
    if status.mode == "local":
        return f"{_command('swanlab')} watch {_shorter(settings.log_dir)}"
    return f"{_command('swanlab-ray')} sync {_shorter(Path(status.journal))}"


def _shorter(path: Path) -> str:
    try:
        path = Path(os.path.relpath(path)) if path.is_relative_to(Path.cwd()) else path
    except FileNotFoundError:  # the working directory is gone
        pass
    return shlex.quote(str(path))


def _log_dir_option(log_dir: Path) -> str:
    """What tells a command where this run lies, if it would look elsewhere."""
    named = next((os.environ[name] for name in LOG_DIR_VARIABLES if os.environ.get(name)), "swanlog")
    return "" if absolute(Path(named)) == log_dir else f" --log-dir {_shorter(log_dir)}"


def _command(name: str) -> str:
    """How to call a command of this environment, also where it is not activated."""
    return name if shutil.which(name) else os.path.relpath(Path(sys.executable).with_name(name))
