"""``swanlab-ray verify``: every record of the journals, and what must have been there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import click

from swanlab_ray.actors.journal.batches import undecodable
from swanlab_ray.actors.journal.reading import Damaged, entries
from swanlab_ray.actors.journal.records import Batch, Header, UnknownFormat
from swanlab_ray.actors.runs.finding import RunFiles, find_runs
from swanlab_ray.actors.wire.codec import Undecodable, decode_batch
from swanlab_ray.actors.wire.text import many
from swanlab_ray.actors.wire.version import package_version
from swanlab_ray.observer.history import archive


class Verdict(IntEnum):
    """What can be said of journals; of several, the worst."""

    WHOLE = 0
    MORE = 1
    DAMAGED = 2

    def __str__(self) -> str:
        return _VERDICTS[self]


_VERDICTS = {
    Verdict.WHOLE: "everything is there",
    Verdict.MORE: "what is there is whole, but it may not be all: see above",
    Verdict.DAMAGED: "something is damaged or missing",
}

UNREAD_SHOWN = 10
"""Batches of a file that are named each."""


@dataclass(slots=True)
class FileReport:
    """What one file holds."""

    path: Path
    records: int = 0
    batches: int = 0
    events: int = 0
    damaged: list[Damaged] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    """What of its batches this version cannot read, in words."""
    package: str = ""
    """The version of swanlab-ray that wrote it; empty where it does not say."""

    @property
    def whole(self) -> bool:
        """Whether all of it can be read, but for a write that a kill cut off."""
        return not self.unread and all(damaged.damage.torn for damaged in self.damaged)


def inspect(path: Path) -> FileReport:
    """Check every record of a file, and decode every batch."""
    report = FileReport(path)
    for found in entries(path):
        if isinstance(found, Damaged):
            report.damaged.append(found)
            continue
        report.records += 1
        entry = found[1]
        if isinstance(entry, Batch):
            report.batches += 1
            report.events += entry.events
            report.unread += _unread(entry)
        elif isinstance(entry, Header):
            report.package = entry.package
    return report


def _unread(batch: Batch) -> list[str]:
    try:
        rejected = decode_batch(batch.data)[1]
    except Undecodable as error:
        return [undecodable(batch, error)]
    where = f"batch {batch.seq} of rank {batch.rank}"
    return [f"{where}: {bad.key}: {bad.reason}" for bad in rejected if bad.whole]


def verify(paths: Sequence[Path], say: Callable[[str], None]) -> Verdict:
    """Check the journals at or under these paths.

    Args:
        paths: files, run directories, log directories.
        say: takes a line of the report.

    Raises:
        FileNotFoundError: a path does not exist.
        click.ClickException: there is no journal.
    """
    found = find_runs(list(paths))
    files = {path for run in found for path in run.paths}
    strays = [path for path in paths if path.is_file() and path.resolve() not in files]
    for path in strays:
        say(f"{path}: no header can be read: this is no journal, or its beginning is damaged")
    if not found and not strays:
        raise click.ClickException(f"No journal lies under {', '.join(repr(str(path)) for path in paths)}.")
    # Every run is looked at, whatever was found in those before.
    return max([*(_check_readable(run, say) for run in found), *(Verdict.DAMAGED for _ in strays)])


def _check_readable(files: RunFiles, say: Callable[[str], None]) -> Verdict:
    try:
        return _check(files, say)
    except (UnknownFormat, OSError) as error:
        say(f"run {files.run_id}: {archive.unreadable(error)}")
        return Verdict.DAMAGED


def _check(files: RunFiles, say: Callable[[str], None]) -> Verdict:
    run = archive.load_run(files)
    say(f"run {files.run_id}: {run.state}")
    if files.ambiguous:
        say(f"  {archive.AMBIGUOUS}")
    if run.untaken:
        say("  no writer took it: upload it with swanlab-ray sync")
    elif run.only_spooled:
        say("  its journal is not here: upload what ranks had put aside with swanlab-ray sync")
    reports = [inspect(path) for path in files.paths]
    for report in reports:
        _tell_file(report, say)
    whole = any(report.records for report in reports) and all(report.whole for report in reports)
    for gap in archive.gaps(files, run.summary):
        whole = False
        steps = f"between steps {gap.after_step} and {gap.before_step}"
        say(f"  rank {gap.rank}: batches {gap.first} to {gap.last} are MISSING, {steps}")
    for name in archive.missing_files(files):
        whole = False
        say(f"  {name} is MISSING")
    for account in run.accounts:
        if account.missing:
            whole = False
            say(f"  rank {account.rank}: {account.missing} events that were acknowledged are MISSING")
    more = list(_perhaps_more(run))
    for sentence in more:
        say(f"  {sentence}")
    return Verdict.DAMAGED if not whole else Verdict.MORE if more else Verdict.WHOLE


def _perhaps_more(run: archive.Run) -> Iterator[str]:
    """Why these files may not be all of the run, whole as they are."""
    if run.state == "unfinished":
        yield "the files tell of no end: what may have come after them cannot be checked"
    elif run.state == "running":
        yield "somebody is at work on it: what comes after this has not been checked"
    for account in run.accounts:
        here = sum(life.events for (rank, _), life in run.summary.lives.items() if rank == account.rank)
        aside = account.written + account.spooled - here
        if aside > 0:
            yield f"rank {account.rank} has {many(aside, 'event')} on a disk of its own: copy its spool to the journal"


def _tell_file(report: FileReport, say: Callable[[str], None]) -> None:
    batches = f"{report.batches} batch{'es' * (report.batches != 1)}"
    say(f"  {report.path}: {many(report.records, 'record')}, {batches}, {many(report.events, 'event')}")
    if not report.records and not report.damaged:
        say("    it is EMPTY: its writer was killed as it began, or the disk has lost what was in it")
    for damaged in report.damaged:
        place = f"bytes {damaged.damage.offset} to {damaged.damage.end}"
        if damaged.damage.torn:
            say(f"    {place}: cut off: by a kill in the middle of a write, never acknowledged then, or by a cut later")
        else:
            say(f"    {place}: DAMAGED, {damaged.damage.reason}")
    for unread in report.unread[:UNREAD_SHOWN]:
        say(f"    UNREADABLE: {unread}")
    if len(report.unread) > UNREAD_SHOWN:
        say(f"    and {len(report.unread) - UNREAD_SHOWN} more that cannot be read")
    if report.unread:
        say(f"    it was written by swanlab-ray {report.package or '?'}; this is {package_version() or '?'}")
