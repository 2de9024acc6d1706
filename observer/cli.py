"""The command ``swanlab-ray``."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from swanlab_ray.actors.journal.records import REDUCTION_VERSION, VERSION
from swanlab_ray.actors.settings import LOG_DIR_VARIABLES, MODES, ObserverSettings, SettingsError, check_writable
from swanlab_ray.actors.wire.naming import absolute
from swanlab_ray.actors.wire.text import many
from swanlab_ray.observer.looking.render import json_text, say, shown, terminal
from swanlab_ray.observer.looking.streams import Command

if TYPE_CHECKING:
    from swanlab_ray.actors.runs.finding import RunFiles
    from swanlab_ray.observer.history.archive import Run
    from swanlab_ray.observer.history.upload import Synced


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    package_name="swanlab-ray",
    message=f"%(prog)s %(version)s (journal's protocol {VERSION}, reduction {REDUCTION_VERSION})",
)
def main() -> None:
    """One Ray actor observes every rank of a distributed training and writes one SwanLab run."""


@main.command(short_help="Train a small Llama here and watch every rank.")
@click.option("--mode", default="local", show_default=True, metavar="|".join(MODES[:3]), help="Where the run goes.")
@click.option(
    "--ranks", default=2, show_default=True, type=click.IntRange(1, 64), help="Processes that train together."
)
@click.option("--steps", default=60, show_default=True, type=click.IntRange(1), help="Optimizer steps.")
@click.option("--slow-rank", type=click.IntRange(0), help="Let the data loading of this rank sleep; see it named.")
@click.option("--project", default="swanlab-ray-demo", show_default=True, help="SwanLab project.")
@click.option("--log-dir", help="Where the run is kept.  [default: SWANLAB_LOG_DIR, else ./swanlog]")
def demo(mode: str, ranks: int, steps: int, slow_rank: int | None, project: str, log_dir: str | None) -> None:
    """Train a small Llama on this machine's CPU with torchrun, and watch every rank.

    Nothing is downloaded: the text is the source of Python's standard library.
    """
    from swanlab_ray.observer.demo.run import run_demo

    if mode == "disabled":
        raise click.UsageError("The demo shows a run, so --mode disabled makes no sense: use local, offline or cloud.")
    if slow_rank is not None and slow_rank >= ranks:
        raise click.UsageError(f"--slow-rank {slow_rank} is none of the {ranks} ranks, which are 0 to {ranks - 1}.")
    values: dict[str, Any] = {"mode": mode, "project": project}
    if log_dir is not None:
        values["log_dir"] = log_dir
    try:
        settings = ObserverSettings(**values)
        check_writable(settings.log_dir)
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    sys.exit(run_demo(settings, ranks, steps, terminal(), slow_rank))


@main.command(short_help="Show the runs in progress.")
@click.argument("run_id", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def status(run_id: str | None, as_json: bool) -> None:
    """Show the runs in progress: step, ranks, loss, events, lag.

    Looks at the cluster named by RAY_ADDRESS, else at the one on this machine. RUN_ID chooses one run.
    """
    from swanlab_ray.observer.looking import watch
    from swanlab_ray.observer.ray_cluster.finding import NoCluster

    try:
        watcher = watch.Watcher(run_id)
    except NoCluster as error:
        raise _failure(str(error)) from None
    statuses = watcher.statuses()
    watcher.close()
    if run_id is not None and not statuses:
        raise _failure(f"No run '{run_id}' is in progress on this cluster.")
    if as_json:
        print(json_text(statuses))
        return
    console = terminal()
    if not statuses:
        console.print("No run is in progress on this cluster.")
    for one in statuses:
        say(console, watch.status_line(one))
        console.print(watch.rank_table(one))
        for notice in one.notices:
            say(console, notice)


def _not_empty(context: click.Context, parameter: click.Parameter, text: str | None) -> str:
    if text is not None and not text.strip():
        raise click.BadParameter("it is empty: leave the option out, or name something.")
    return text or ""


def _directory(context: click.Context, parameter: click.Parameter, text: str | None) -> Path:
    named = Path(_not_empty(context, parameter, text))
    try:  # a variable may begin with ~, which no shell has seen
        return absolute(named) if str(named).startswith("~") else named
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _log_dir(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--log-dir",
        envvar=LOG_DIR_VARIABLES,
        default="swanlog",
        callback=_directory,
        help="Where runs are kept.  [default: OBSERVER_LOG_DIR or SWANLAB_LOG_DIR, else ./swanlog]",
    )(command)


def _as_json(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")(command)


PATHS = "name a journal, a run's directory (swanlog/observer/RUN), or a log directory"


def _named(context: click.Context, parameter: click.Parameter, paths: tuple[str, ...]) -> tuple[Path, ...]:
    """An empty path would mean the current directory, and everything below it."""
    if not all(paths):
        raise click.BadParameter(f"'' is no path: {PATHS}.")
    return tuple(map(Path, paths))


_paths = click.argument("paths", nargs=-1, required=True, metavar="PATH...", callback=_named)


@main.command(short_help="List the runs in the log directory.")
@_log_dir
@_as_json
def runs(log_dir: Path, as_json: bool) -> None:
    """List the runs in the log directory, from their journals. Needs no cluster."""
    from swanlab_ray.observer.history import archive

    refused: list[str] = []
    found = _guarded(lambda: archive.load(log_dir, refused.append)) if log_dir.exists() else []
    if as_json:
        print(json_text([run.as_json() for run in found]))
    elif found:
        terminal().print(archive.runs_table(found))
    elif not refused:
        raise _failure(f"No run lies in {log_dir}: choose another with --log-dir.")
    for sentence in refused:
        click.echo(shown(sentence), err=True)
    sys.exit(1 if refused else 0)


@main.command(short_help="Show one run: its end, its ledger, its alerts, its completions, its phases, its stacks.")
@click.argument("run_id", required=False)
@click.option("--completions", is_flag=True, help="Show what the model was shown and has said, of every rank.")
@click.option("--phases", is_flag=True, help="Show where the time of the steps went, by phase and rank.")
@click.option("--stacks", is_flag=True, help="Show where the ranks stood when the job hung.")
@click.option(
    "--last", type=click.IntRange(1, 10**9), help="Completions to show [default: 20], or steps [default: 1000]."
)
@_log_dir
@_as_json
def show(
    run_id: str | None, completions: bool, phases: bool, stacks: bool, last: int | None, log_dir: Path, as_json: bool
) -> None:
    """Show one run from its journal: how it ended, where every event of each rank is, what was alerted, the last
    values; with --completions the latest rows of RLHF completions, whole; with --phases the mean time of a step by
    phase and rank, and the rank that the others wait for; with --stacks the Python stacks of the ranks of a job that
    hung. RUN_ID may be its beginning, or the run's directory; without it the latest run is
    shown. Needs no cluster.
    """
    from swanlab_ray.observer.looking import showing

    if completions + phases + stacks > 1:
        raise click.UsageError("Choose one of --completions, --phases and --stacks.")
    if last is not None and not (completions or phases):
        raise click.UsageError("--last goes with --completions or --phases.")
    run = _find_run(run_id, log_dir)
    if completions:
        showing.show_completions(run.files, last or 20, as_json)
    elif phases:
        showing.show_phases(run.files, last or 1000, as_json)
    elif stacks:
        showing.show_stacks(run.files, as_json)
    else:
        showing.show_run(run, as_json)


def _find_run(run_id: str | None, log_dir: Path) -> Run:
    """The run of that id, of that beginning of an id, or in that directory; the latest one where none is given."""
    from swanlab_ray.observer.history import archive

    if run_id and os.sep in run_id and os.path.isdir(run_id):  # no id has a separator
        found: list[RunFiles] = _guarded(lambda: archive.matching(Path(run_id), ""))
    else:
        found = _guarded(lambda: archive.matching(log_dir, run_id)) if run_id != "" else []
    if len(found) == 1:
        run: Run = _guarded(lambda: archive.load_run(found[0]))
        return run
    if found:
        raise _failure(f"'{run_id}' names {len(found)} runs: {_ids(found)}; write one of these.")
    if run_id is None:
        raise _failure(f"No run lies in '{log_dir}': choose another with --log-dir.")
    known: list[RunFiles] = _guarded(lambda: archive.matching(log_dir, ""))
    there = f"; there are: {_ids(known)}." if known else ": choose another with --log-dir."
    raise _failure(f"'{run_id}' names no run in {log_dir}{there}")


def _ids(runs: list[RunFiles]) -> str:
    return ("..., " if len(runs) > NAMED_RUNS else "") + ", ".join(run.run_id for run in runs[-NAMED_RUNS:])


NAMED_RUNS = 20
"""Runs that are named to somebody who asks for one that is not there, or for several: the latest."""


@main.command(short_help="Write the timeline of all ranks, for Perfetto.")
@click.argument("run_id", required=False)
@click.option(
    "-o",
    "--output",
    default="trace.json",
    show_default=True,
    type=click.Path(dir_okay=False),
    callback=lambda *given: Path(_not_empty(*given)),
    help="Where to write it; compressed where the name ends in .gz.",
)
@click.option("--steps", metavar="FIRST:LAST", help="Only spans of these steps, the last one too.")
@_log_dir
def trace(run_id: str | None, output: Path, steps: str | None, log_dir: Path) -> None:
    """Write the spans of all ranks as one timeline, for https://ui.perfetto.dev or chrome://tracing.

    RUN_ID may be its beginning, or the run's directory; without it the latest run is taken. Needs no cluster.
    """
    from swanlab_ray.observer.history.timeline import Timeline

    chosen = _steps(steps) if steps is not None else None
    run = _find_run(run_id, log_dir)
    timeline = Timeline(run.files, chosen)
    if not timeline.count:
        where = f" in steps {steps}" if steps is not None else ""
        raise _failure(f"Run '{run.files.run_id}' has no spans{where}.")
    try:
        timeline.write(output)
    except OSError as error:
        raise _failure(f"The trace cannot be written to '{output}': {error.strerror or error}.") from None
    told = f"{many(timeline.count, 'span')} of run {run.files.run_id} in {output}: open it with https://ui.perfetto.dev"
    print(shown(told))


def _steps(text: str) -> range:
    found = re.fullmatch("([0-9]{0,18}):([0-9]{0,18})", text)
    if found is None:
        raise click.UsageError(f"--steps {text!r} is no range of steps: write it as 100:200 (or 100: or :200).")
    chosen = range(int(found[1] or 0), int(found[2]) + 1 if found[2] else 1 << 63)
    if not chosen:
        raise click.UsageError(f"--steps {text!r} is no range of steps: it ends before it begins.")
    return chosen


@main.command("verify", short_help="Check every record of a journal.")
@_paths
def verify_journals(paths: tuple[Path, ...]) -> None:
    """Check every record of the journals at or under each PATH, and say what is there and what is missing.

    Exit code 0: nothing is damaged or missing, as far as the files can tell; 1: something is. Where there may be
    more, that is said, and is no damage: the files tell of no end, or a rank has put events aside on its own disk.
    """
    from swanlab_ray.observer.history.verify import Verdict, verify

    verdict = _guarded(lambda: verify(paths, lambda line: print(shown(line))), PATHS)
    print(verdict)
    sys.exit(1 if verdict is Verdict.DAMAGED else 0)


@main.command(short_help="Upload runs from their journals.")
@_paths
@click.option("--project", callback=_not_empty, help="SwanLab project.  [default: the run's]")
@click.option("--workspace", callback=_not_empty, help="SwanLab workspace.  [default: the run's]")
@click.option(
    "--host",
    metavar="URL",
    callback=_not_empty,
    help="SwanLab cloud that gets the runs, and the key.  [default: the one your key was given for]",
)
@click.option("--force", is_flag=True, help="End a run though somebody seems to be at work on it.")
def sync(paths: tuple[Path, ...], project: str | None, workspace: str | None, host: str | None, force: bool) -> None:
    """Upload the runs at or under each PATH to SwanLab's cloud, each into one experiment, with its spools.

    A PATH is a log directory, a run's directory in it (swanlog/observer/RUN), or a single file. What is there already
    stays; interrupt, repeat and continue at will. The key comes from SWANLAB_API_KEY, or from `swanlab login`.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from swanlab_ray.actors.journal.records import UnknownFormat
    from swanlab_ray.observer.history import upload as uploads

    given = {"project": project, "workspace": workspace, "api_host": host}
    chosen: dict[str, object] = {name: value for name, value in given.items() if value}
    console = Console(highlight=False, stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]} scalars"))
    progress = Progress(*columns, TimeElapsedColumn(), console=console)
    bar = progress.add_task("uploading", total=None, done=0)

    def upload(run: RunFiles) -> Synced | str:
        try:
            return uploads.sync_run(run, lambda done, events: progress.update(bar, done=done), force, chosen)
        except (SettingsError, UnknownFormat) as error:  # of this run alone
            return str(error)

    def upload_all() -> list[Synced | str]:
        with progress if console.is_terminal else nullcontext():
            return [upload(run) for run in uploads.runs_under(list(paths))]

    synced = _guarded(upload_all, PATHS)
    for run in synced:
        _tell_synced(run)
    sys.exit(1 if any(isinstance(run, str) or run.damaged for run in synced) else 0)


def _tell_synced(run: Synced | str) -> None:
    if isinstance(run, str):
        print(shown(f"Error: {run}"), file=sys.stderr)
        return
    tables = f" and {many(run.tables, 'table')}" if run.tables else ""
    withheld = f", {run.withheld} withheld" if run.withheld else ""
    uploaded = f"{many(run.uploaded, 'scalar')}{tables} uploaded, {run.present} were there{withheld}"
    print(shown(f"run {run.run_id}: {uploaded}; {run.url}"))
    for notice in run.notices:
        print(shown(f"  {notice}"))
    if run.damaged:
        places = "one place" if run.damaged == 1 else f"{run.damaged} places"
        print(f"  {places} could not be read: swanlab-ray verify tells what is missing")


@main.command(short_help="Look for what is wrong on this machine, or on all of a job.")
@click.option("--lark", is_flag=True, help="Send a test message to the bot of SWANLAB_LARK_WEBHOOK_URL.")
def doctor(lark: bool) -> None:
    """Look for what is wrong on this machine before a training finds out: settings, versions, disk, ports, SwanLab's
    cloud and key, the Lark (Feishu) bot, the Ray cluster; then a run of a second, which nobody sees.

    With a launcher it looks at every machine of a job, and whether they reach each other:

    \b
      torchrun --nnodes=2 ... --nproc_per_node=1 --no-python swanlab-ray doctor
    """
    from swanlab_ray.observer.doctor.examine import examine

    console, host = terminal(), socket.gethostname().partition(".")[0]
    wrong = 0
    for found in examine(lark):
        wrong += found.state == "wrong"
        line = f"{host}  {found.state:5}  {found.about}: {found.told}"
        say(console, line, {"ok": "green", "note": "yellow", "wrong": "bold red"}[found.state])
        sys.stdout.flush()
    if wrong:
        raise _failure(f"{many(wrong, 'thing')} to mend on {host}.")


def _failure(sentence: str) -> click.ClickException:
    return click.ClickException(shown(sentence))


def _guarded(action: Callable[[], Any], remedy: str = "") -> Any:
    """Do it; a problem of the user's becomes one sentence, with a remedy where something does not exist."""
    from swanlab_ray.actors.journal.records import UnknownFormat
    from swanlab_ray.actors.swanlab.experiment import CloudError

    try:
        return action()
    except FileNotFoundError as error:
        what = f"'{error.filename}' does not exist" if error.filename else str(error)
        raise _failure(f"{what}: {remedy}." if remedy else f"{what}.") from None
    except CloudError as error:
        raise _failure(f"The SwanLab cloud cannot be used: {error}.") from None
    except PermissionError as error:
        raise _failure(f"'{error.filename}' cannot be read: {error.strerror}.") from None
    except (SettingsError, UnknownFormat) as error:
        raise _failure(str(error)) from None


if __name__ == "__main__":
    main()
