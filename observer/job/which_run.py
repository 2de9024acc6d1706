"""Which run a ``connect()`` begins, of those that one job keeps one after another.

A process that connects again after ``finish()`` begins another run, and so does the next program of the same Slurm step
or MPI launch: their variables are those of every program that is started in it, from an interactive shell or by
``srun bash -c "a; b"``. Each rank counts the runs that it has begun. Ranks begin the same runs in the same order, so
their numbers agree without a word between them. A job that is started again counts anew, and so goes on with its runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.naming import slug
from swanlab_ray.observer.job.identity import Identity, scheduler_step
from swanlab_ray.observer.script.notices import logger, warn_once

MOST_RUNS = 100_000

_begun = 0
"""Runs of this process without a run id of the user's."""
_named: set[str] = set()
"""Run ids that the user has named for runs of this process."""


def which_run(settings: ObserverSettings, identity: Identity) -> int:
    """Number of the run that begins now, 1 for a job's first; the same on every rank."""
    global _begun
    if settings.run_id is not None:
        if settings.run_id in _named and identity.rank == 0:
            logger.warning(
                f"Run {settings.run_id!r} was finished by this process and is continued now: what is logged again "
                "replaces what it has from that step on. For a run of its own give another run_id, or none."
            )
        _named.add(settings.run_id)
        return 1
    _begun += 1
    step = scheduler_step(identity)
    return (step and next_in_step(settings.log_dir, step, identity.rank)) or _begun


def warn_of_joining(kept: ObserverSettings, run: str | None, given: ObserverSettings) -> None:
    """Somebody means a second run, perhaps: a callback for each fold, and no ``finish()`` in between."""
    new, old = given.public(), kept.public()
    names = sorted(name for name in new.keys() | old.keys() if new.get(name) != old.get(name))
    told = ", ".join(f"{name}={new.get(name)!r:.80}" for name in names) or "other secrets"
    warn_once(
        f"joined with {told}",
        f"connect() was called again with other settings ({told}) while this process's run ({run}) is not finished: it "
        "goes on as it began and takes what is logged. For a run of its own call finish() on its observer first.",
    )


def forget_runs() -> None:
    """In a forked child, which has begun none."""
    global _begun
    _begun = 0
    _named.clear()


def next_in_step(log_dir: Path, step: str, rank: int, env: Mapping[str, str] = os.environ) -> int | None:
    """Number of the run that this rank begins now in a step; None where that cannot be kept. Each is an empty file."""
    attempt = slug(env.get("SLURM_RESTART_COUNT", ""))[:20] or "0"
    directory = log_dir / "observer" / ".programs" / step
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            if _claimed(directory / f"{attempt}-{rank}-{number}"):
                return number
            if number >= MOST_RUNS:
                return None
    except OSError as error:
        warn_once(
            "programs",
            f"Programs that are started in one Slurm step or MPI launch cannot be told apart here ({error}): give each "
            "an OBSERVER_RUN_ID of its own.",
        )
    return None


def _claimed(file: Path) -> bool:
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return False
    return True
