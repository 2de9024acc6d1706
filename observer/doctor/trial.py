"""A run of a second, by the way that a training's values go, with all ranks that the launcher starts."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from swanlab_ray.actors.settings import ObserverSettings, SettingsError
from swanlab_ray.actors.wire.status import WriterStatus
from swanlab_ray.actors.wire.text import many
from swanlab_ray.observer.doctor.finding import Finding
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.script.notices import logger
from swanlab_ray.observer.session import connect

PREFIX = "swanlab-ray-doctor-"
EVENTS = 5
CLOCK_S = 2.0
"""By how much clocks may differ: messages tell it to about one second."""


def examine_trial(settings: ObserverSettings, world_size: int) -> Iterator[Finding]:
    """What came of it, as this rank sees it; the last one to end tells of all.

    Args:
        settings: of a training; the trial has nothing to do with its run, the cloud or the bot.
        world_size: how many ranks ought to take part.
    """
    logger.setLevel(logging.WARNING)  # nobody is to upload it
    directory = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        observer = connect(
            project="doctor",
            mode="offline",
            run_id=settings.run_id and f"{settings.run_id[:50]}-doctor",
            log_dir=directory,
            alerts=(),
            node_interval=0,
            rank_timeout=10,
            dashboard=False,
            lark_webhook_url=None,
            lark_secret=None,
        )
        yield from _through(observer, world_size)
    except (SettingsError, ConnectionError) as error:
        yield Finding("wrong", "trial run", str(error).rstrip("."))
    finally:
        with suppress(OSError):
            directory.rmdir()  # it may be the one that the writer, or a spool, is in


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
    if observer.outcome is not None:
        yield from _of_all(observer.outcome, world_size)
        log_dir = Path(observer.outcome.journal).parents[1]
        if observer.outcome.closed and log_dir.name.startswith(PREFIX):
            shutil.rmtree(log_dir, ignore_errors=True)


def _of_all(status: WriterStatus, world_size: int) -> Iterator[Finding]:
    came = {rank.rank: rank for rank in status.ranks}
    missing = [str(rank) for rank in range(world_size) if rank not in came]
    hosts = sorted({rank.host for rank in status.ranks})
    told = f"{many(len(came), 'rank')} on {many(len(hosts), 'machine')} ({', '.join(hosts)}) in one run"
    if missing:
        yield Finding("wrong", "all ranks", f"{told}, without {', '.join(missing[:8])}: see what their machines say")
    else:
        yield Finding("ok", "all ranks", told)
    off = {rank.host: rank.behind for rank in status.ranks if abs(rank.behind) > CLOCK_S}
    for host, behind in off.items():
        way = "behind" if behind > 0 else "ahead of"
        yield Finding("note", "clock", f"that of {host} is {abs(behind):.0f} s {way} the writer's: let NTP set them")
    for notice in status.notices:
        yield Finding("note", "run", notice)
