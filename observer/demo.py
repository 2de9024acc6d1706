"""``swanlab-ray demo``: a real distributed training under torchrun, watched from here."""

from __future__ import annotations

import importlib.util
import os
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
from rich.markup import escape

from swanlab_ray.actors.history import find_runs
from swanlab_ray.actors.protocol import WriterStatus
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.status import status_line
from swanlab_ray.observer.breakdown import breakdown, phases_table
from swanlab_ray.observer.cluster import NoCluster, running_address, start_private
from swanlab_ray.observer.identity import fresh_run_id
from swanlab_ray.observer.watch import Watcher, rank_table

POLL_S = 0.5
PLAIN_LINE_S = 3.0
"""Seconds between two lines where the output is no terminal."""


def run_demo(settings: ObserverSettings, ranks: int, steps: int, console: Console, slow_rank: int | None = None) -> int:
    """Train and watch; returns the exit code. The data loading of ``slow_rank`` sleeps, so that it is named.

    Raises:
        click.ClickException: something it needs is not installed, or the log directory cannot be made.
    """
    for module in ("torch", "transformers", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise click.ClickException(f"The demo needs {module}, which is missing: pip install 'swanlab-ray[demo]'.")
    run_id = settings.run_id or fresh_run_id("demo")
    _make_directory(settings.log_dir)
    log_path = settings.log_dir / f"{run_id}.log"
    console.print(f"Training a small Llama: {ranks} ranks, {steps} steps, run {run_id}.", soft_wrap=True, markup=False)
    console.print("Starting torchrun, its ranks and a Ray cluster (about 20 s) ...")
    if running_address() is None:
        start_private(run_id, settings.dashboard)  # while torch is being imported
    with open(log_path, "w") as log, _torchrun(settings, run_id, ranks, steps, slow_rank, log) as training:
        last = _watch(run_id, training, console)
        code = training.wait()
    if code:
        console.print(f"[red]The training failed (exit code {code}).[/] The end of {escape(str(log_path))}:")
        console.print("\n".join(log_path.read_text().splitlines()[-60:]), markup=False, highlight=False)
        return code
    if last is None or not last.closed:
        console.print(f"[red]The run was not seen to its end;[/] see {escape(str(log_path))}.")
        return 1
    console.print(rank_table(last))
    for notice in last.notices:
        console.print(notice, markup=False)
    _show_phases(Path(last.journal), console)
    console.print(f"One run: {last.url or last.run_dir or last.journal}", soft_wrap=True, markup=False)
    console.print(f"Open it: {_open_command(last, settings)}", soft_wrap=True, markup=False)
    ours = _command("swanlab-ray")
    console.print(f"What became of every event: {ours} show {run_id}", soft_wrap=True, markup=False)
    console.print(f"The timeline of all ranks: {ours} trace {run_id}", soft_wrap=True, markup=False)
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
    command += ["-m", "swanlab_ray.observer.demo_training", str(steps)]
    command += [] if slow_rank is None else [str(slow_rank)]
    training = subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True)
    try:
        yield training
    finally:
        if training.poll() is None:
            training.send_signal(signal.SIGINT)
            training.wait(60)


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
                    console.print(status_line(last), markup=False, highlight=False, soft_wrap=True)
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
    (run,) = find_runs([journal])
    found = breakdown(run)
    if found.steps:
        console.print("Where the time of a step went (mean):")
        console.print(phases_table(found.steps))
    if found.straggler is not None:
        console.print(f"Straggler: {found.straggler}", style="yellow", markup=False)


def _open_command(status: WriterStatus, settings: ObserverSettings) -> str:
    if status.url:
        return status.url
    if status.mode == "local":
        return f"{_command('swanlab')} watch {_shorter(settings.log_dir)}"
    return f"{_command('swanlab-ray')} sync {_shorter(Path(status.journal))}"


def _shorter(path: Path) -> str:
    try:
        return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    except FileNotFoundError:  # the working directory is gone
        return str(path)


def _command(name: str) -> str:
    """How to call a command of this environment, also where it is not activated."""
    return name if shutil.which(name) else os.path.relpath(Path(sys.executable).with_name(name))
