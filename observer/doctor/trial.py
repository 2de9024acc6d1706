"""A run of a second, by the way that a training's values go, with all ranks that the launcher starts."""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from swanlab_ray.actors.journal.records import Arrived, Closed
from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.actors.settings import ObserverSettings, SettingsError
from swanlab_ray.actors.wire.status import WriterStatus
from swanlab_ray.actors.wire.text import many
from swanlab_ray.observer.doctor.finding import Finding, phrase
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.script.notices import logger
from swanlab_ray.observer.session import connect

PREFIX = "swanlab-ray-doctor-"
EVENTS = 5
RANK_TIMEOUT_S = 10.0
GIVEN_UP_S = 3 * RANK_TIMEOUT_S
"""How long rank 0 waits for the end of a run to which not all have come."""
POLL_S = 0.5
INTERRUPTED_S = 5.0
"""How long Ctrl-C waits for the run's end."""
CLOCK_S = 2.0
"""By how much clocks may differ: messages tell it to about one second."""


def examine_trial(settings: ObserverSettings, world_size: int) -> Iterator[Finding]:
    """What came of it, as this rank sees it; the last one to end tells of all.

    Args:
        settings: of a training; the trial has nothing to do with its run, the cloud or the bot.
        world_size: how many ranks ought to take part.
    """
    logger.setLevel(logging.WARNING)  # nobody is to upload it
    there_was = settings.log_dir.exists()
    directory = settings.log_dir / f"{PREFIX}{secrets.token_hex(3)}"
    observer: Observer | None = None
    try:
        observer = connect(
            use_swanlab=True,
            project="doctor",
            mode="offline",
            run_id=settings.run_id and f"{settings.run_id[:50]}-doctor",
            log_dir=directory,
            alerts=(),
            node_interval=0,
            rank_timeout=RANK_TIMEOUT_S,
            dashboard=False,
            lark_webhook_url=None,
            lark_secret=None,
        )
        yield from _through(observer, world_size)
    except (SettingsError, ConnectionError) as error:
        yield Finding("wrong", "trial run", phrase(error))
    except BaseException:  # Ctrl-C
        if observer is not None:
            observer.finish("aborted", "interrupted", timeout=INTERRUPTED_S)
        _remove(directory)
        raise
    finally:
        if not list(directory.glob("observer/*/journal-*")):  # else it is the writer's, and perhaps not over
            _remove(directory)  # what could not be sent, and who takes part
        if not there_was:
            with suppress(OSError):
                settings.log_dir.rmdir()  # unless others are not yet done


def _through(observer: Observer, world_size: int) -> Iterator[Finding]:
    began = time.monotonic()
    observer.require_ready()
    started = time.monotonic() - began
    took = []
    for step in range(EVENTS):
        observer.log({"doctor": step}, step)
        sent = time.monotonic()
        if observer.flush(30):
            took.append(time.monotonic() - sent)
    if not observer.finish(timeout=60) or len(took) < EVENTS:
        counts = observer.statistics()
        told = f"{many(counts.logged, 'event')} were logged and {counts.acknowledged} acknowledged"
        yield Finding("wrong", "trial run", f"{told}: see what was said above")
        return
    told = f"the writer answered after {started:.1f} s, and events were on its disk after {1e3 * min(took):.0f} ms"
    yield Finding("ok", "trial run", told)
    outcome = observer.outcome
    if outcome is not None:
        hosts = {rank.rank: rank.host for rank in outcome.ranks}
        yield _of_all(hosts, world_size)
        yield from _clocks(outcome)
        yield from (Finding("note", "run", notice) for notice in outcome.notices)
        _remove(Path(outcome.journal).parents[1])
    elif observer.rank == 0:  # it does not end before all have come, or are given up
        for directory in observer.settings.log_dir.parent.glob(f"{PREFIX}*/observer/{observer.run_id}"):
            with suppress(FileNotFoundError):  # the last one has told, and removed it
                yield _of_all(_came(directory), world_size)
            _remove(directory.parents[1])


def _remove(log_dir: Path) -> None:
    if log_dir.name.startswith(PREFIX):
        shutil.rmtree(log_dir, ignore_errors=True)


def _came(directory: Path) -> dict[int, str]:
    """The machine of each rank that has come, once nobody is waited for any more."""
    deadline = time.monotonic() + GIVEN_UP_S
    while True:
        entries = [entry for run in find_runs([directory]) for entry in merged(run)]
        if time.monotonic() >= deadline or any(isinstance(entry, Closed) for entry in entries):
            return {entry.rank: entry.host for entry in entries if isinstance(entry, Arrived)}
        time.sleep(POLL_S)


def _of_all(hosts: dict[int, str], world_size: int) -> Finding:
    missing = [str(rank) for rank in range(world_size) if rank not in hosts]
    machines = sorted(set(hosts.values()))
    told = f"{many(len(hosts), 'rank')} on {many(len(machines), 'machine')} ({', '.join(machines)}) in one run"
    if missing:
        which = f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(missing[:8])}{', ...' * (len(missing) > 8)}"
        return Finding("wrong", "all ranks", f"{told}, without {which}: see what their machines say")
    return Finding("ok", "all ranks", told)


def _clocks(status: WriterStatus) -> Iterator[Finding]:
    off = {rank.host: rank.behind for rank in status.ranks if abs(rank.behind) > CLOCK_S}
    for host, behind in off.items():
        way = "behind" if behind > 0 else "ahead of"
        yield Finding("note", "clock", f"that of {host} is {abs(behind):.0f} s {way} the writer's: let NTP set them")
