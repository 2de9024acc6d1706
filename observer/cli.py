"""The command ``swanlab-ray``."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
from rich.console import Console

from swanlab_ray.actors.settings import MODES, ObserverSettings, SettingsError, check_writable


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="swanlab-ray")
def main() -> None:
    """One Ray actor observes every rank of a distributed training and writes one SwanLab run."""


@main.command(short_help="Train a small Llama here and watch every rank.")
@click.option("--mode", default="local", show_default=True, metavar="|".join(MODES[:3]), help="Where the run goes.")
@click.option(
    "--ranks", default=2, show_default=True, type=click.IntRange(1, 64), help="Processes that train together."
)
@click.option("--steps", default=60, show_default=True, type=click.IntRange(1), help="Optimizer steps.")
@click.option("--project", default="swanlab-ray-demo", show_default=True, help="SwanLab project.")
@click.option("--log-dir", help="Where the run is kept.  [default: SWANLAB_LOG_DIR, else ./swanlog]")
def demo(mode: str, ranks: int, steps: int, project: str, log_dir: str | None) -> None:
    """Train a small Llama on this machine's CPU with torchrun, and watch every rank.

    Nothing is downloaded: the text is the source of Python's standard library.
    """
    from swanlab_ray.observer.demo import run_demo

    if mode == "disabled":
        raise click.UsageError("The demo shows a run, so --mode disabled makes no sense: use local, offline or cloud.")
    values: dict[str, Any] = {"mode": mode, "project": project}
    if log_dir is not None:
        values["log_dir"] = log_dir
    try:
        settings = ObserverSettings(**values)
        check_writable(settings.log_dir)
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    sys.exit(run_demo(settings, ranks, steps, Console(highlight=False)))


@main.command(short_help="Show the runs in progress.")
@click.argument("run_id", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def status(run_id: str | None, as_json: bool) -> None:
    """Show the runs in progress: step, ranks, loss, events, lag.

    Looks at the cluster named by RAY_ADDRESS, else at the one on this machine. RUN_ID chooses one run.
    """
    from swanlab_ray.observer import watch
    from swanlab_ray.observer.cluster import NoCluster

    try:
        watcher = watch.Watcher(run_id)
    except NoCluster as error:
        raise click.ClickException(str(error)) from None
    statuses = watcher.statuses()
    watcher.close()
    if run_id is not None and not statuses:
        raise click.ClickException(f"No run '{run_id}' is in progress on this cluster.")
    if as_json:
        click.echo(json.dumps([watch.as_json(one) for one in statuses]))
        return
    console = Console(highlight=False)
    if not statuses:
        console.print("No run is in progress on this cluster.")
    for one in statuses:
        console.print(watch.status_line(one), markup=False, soft_wrap=True)
        console.print(watch.rank_table(one))
        for notice in one.notices:
            console.print(notice, markup=False)


if __name__ == "__main__":
    main()
