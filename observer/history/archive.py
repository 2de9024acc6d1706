"""Runs as their journals tell them, for ``swanlab-ray runs``, ``show`` and ``verify``: no cluster, no SwanLab."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from swanlab_ray.actors.journal.batches import BatchReader
from swanlab_ray.actors.journal.files import journal_files
from swanlab_ray.actors.journal.reading import Damaged
from swanlab_ray.actors.journal.records import Batch, UnknownFormat
from swanlab_ray.actors.reduction.supersession import supersession
from swanlab_ray.actors.runs.finding import RunFiles, find_runs
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.actors.runs.summary import Summary, ending, summarise
from swanlab_ray.actors.wire.events import JOB, Completions, Scalars, Spans, Stacks
from swanlab_ray.actors.wire.text import first_line, many
from swanlab_ray.observer.history.ledger import Ledger, ledgers, with_rejected
from swanlab_ray.observer.looking.render import Column, Grid, cell

SHOWN_VALUES = 20


@dataclass(frozen=True, slots=True)
class Gap:
    """Batches of a rank that damage took."""

    rank: int
    first: int
    last: int
    """Sequence numbers, both included."""
    after_step: int | None
    before_step: int | None
    """The steps next to the gap that are there."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a log directory."""

    files: RunFiles
    summary: Summary
    accounts: list[Ledger]
    first_ns: int
    last_ns: int
    """When it began and when it was last heard of, Unix nanoseconds."""

    @property
    def state(self) -> str:
        """``running``, how it ended, or ``unfinished``: its writer was killed and nobody took over."""
        if self.files.in_progress:
            return "running"
        end = ending(self.summary)
        return end[0] if end else "unfinished"

    @property
    def only_spooled(self) -> bool:
        """It has no journal here: its events lie in the spools of its ranks."""
        return not self.files.journals

    @property
    def untaken(self) -> bool:
        """No writer has had anything of it, as far as the numbers of what was put aside tell."""
        return self.only_spooled and not any(life.missing for life in self.summary.lives.values())

    @property
    def damage(self) -> list[Damaged]:
        """Damaged places, without writes that a kill cut off."""
        return [damaged for damaged in self.summary.damaged if not damaged.damage.torn]

    def as_json(self, rejected: Mapping[int, int] | None = None) -> dict[str, Any]:
        """Plain values, for ``--json``.

        Args:
            rejected: wrong values that were found in the batches, by rank. Without it nothing is said of those that
                were refused: a rank counts what it finds itself.
        """
        told = [name for name in Ledger.__dataclass_fields__ if name != "refused" or rejected is not None]
        summary, settings = self.summary, self.files.header.settings
        return {
            "run_id": self.files.run_id,
            "project": settings.get("project"),
            "experiment_name": settings.get("experiment_name"),
            "mode": settings.get("mode"),
            "state": self.state,
            "only_spooled": self.only_spooled,
            "error": summary.finished.error if summary.finished else None,
            "started_ns": self.first_ns,
            "last_ns": self.last_ns,
            "world_size": summary.world_size,
            "events": summary.events,
            "bytes": summary.size,
            "files": [str(path) for path in self.files.paths],
            "swanlab": _place(summary),
            "in_swanlab": summary.closed.model_dump(mode="json", exclude={"type", "time_ns"})
            if summary.closed
            else None,
            "damaged": len(self.damage),
            "ranks": [
                {name: getattr(account, name) for name in told}
                for account in with_rejected(self.accounts, rejected or {})
            ],
            "alerts": [alert.text for alert in summary.alerts],
        }


def load(log_dir: Path, refused: Callable[[str], None] | None = None) -> list[Run]:
    """The runs under a log directory, oldest first.

    Args:
        log_dir: it.
        refused: is told of runs that cannot be read, instead of an exception.

    Raises:
        FileNotFoundError: it does not exist.
        UnknownFormat: a journal is of a newer version.
    """
    runs = []
    for files in find_runs([log_dir]):
        try:
            runs.append(load_run(files))
        except (UnknownFormat, OSError) as error:
            if refused is None:
                raise
            refused(f"run {files.run_id}: {unreadable(error)}")
    return runs


def unreadable(error: UnknownFormat | OSError) -> str:
    """Why a run cannot be read."""
    if isinstance(error, OSError) and error.filename:
        return f"'{error.filename}' cannot be read: {error.strerror}"
    return str(error)


def load_run(files: RunFiles) -> Run:
    """Read one run from end to end."""
    journal = summarise(files.journals)
    everything = summarise(files.paths) if files.spools else journal
    spooled = {key: life.events for key, life in everything.lives.items()}
    for key, life in journal.lives.items():
        spooled[key] = spooled.get(key, 0) - life.events
    accounts = list(ledgers(journal, everything, spooled, files.spools))
    first, last = (everything.first_ns, everything.last_ns) if files.journals else _times_of_events(files)
    return Run(files, everything, accounts, first or everything.first_ns, last or everything.last_ns)


def _times_of_events(files: RunFiles) -> tuple[int, int]:
    """When the first and the last event was logged; spools tell when they were put aside. Zeros where there is none."""
    batches = BatchReader()
    found = [
        event.time_ns
        for entry in merged(files)
        if isinstance(entry, Batch)
        for event in batches.events(entry)
        if isinstance(event, (Scalars, Completions, Spans))
    ]
    return min(found, default=0), max(found, default=0)


def matching(log_dir: Path, run_id: str | None) -> list[RunFiles]:
    """The run of this id, or all whose ids begin so, oldest first; the latest one where no id is given. None where
    there is no such directory."""
    runs = find_runs([log_dir]) if log_dir.exists() else []
    if run_id is None:
        return runs[-1:]
    return [run for run in runs if run.run_id == run_id] or [run for run in runs if run.run_id.startswith(run_id)]


def missing_files(run: RunFiles) -> list[str]:
    """Journal files that must have been there, by the numbers of the others: names, and the first and last of many."""
    names = []
    for directory in {path.parent for path in run.journals}:
        there = [0, *journal_files(directory)]
        for before, after in pairwise(there):
            first, last = (f"journal-{epoch:06d}.log" for epoch in (before + 1, after - 1))
            names += [first] if after == before + 2 else [f"{first} to {last}"] if after > before + 2 else []
    return names


def gaps(run: RunFiles, summary: Summary) -> list[Gap]:
    """Where batches are missing, and between which steps."""
    damaged = {key: life for key, life in summary.lives.items() if life.missing}
    steps: dict[tuple[int, str], dict[int, tuple[int, int]]] = {key: {} for key in damaged}
    batches = BatchReader()
    for entry in merged(run) if damaged else ():
        if isinstance(entry, Batch) and (entry.rank, entry.life) in damaged:
            logged = [event.step for event in batches.events(entry) if isinstance(event, Scalars)]
            if logged:
                steps[entry.rank, entry.life][entry.seq] = min(logged), max(logged)
    found = []
    for key, life in damaged.items():
        for first, last in life.missing:
            before = [highest for seq, (_, highest) in steps[key].items() if seq < first]
            after = [lowest for seq, (lowest, _) in steps[key].items() if seq > last]
            found.append(Gap(key[0], first, last, max(before, default=None), min(after, default=None)))
    return found


def stacks(files: RunFiles) -> list[tuple[int, Stacks]]:
    """Where ranks stood when the job hung, in the order in which they said so."""
    batches = BatchReader()
    return [
        (entry.rank, event)
        for entry in merged(files)
        if isinstance(entry, Batch)
        for event in batches.events(entry)
        if isinstance(event, Stacks)
    ]


def latest_values(run: Run, batches: BatchReader | None = None) -> dict[str, tuple[int, float]]:
    """The value of each name that the job or rank 0 logged at its highest step; as in SwanLab the first one there, and
    none that a training has replaced which went back.

    Args:
        run: of which.
        batches: reads them all; by default a new one.
    """
    latest: dict[str, tuple[int, float]] = {}
    superseded, batches = supersession(run.files), batches or BatchReader()
    for entry in merged(run.files):
        if not isinstance(entry, Batch):
            continue
        for life, events in superseded.parts(entry, batches.events(entry)):
            for event in events:
                if not isinstance(event, Scalars) or (event.scope != JOB and entry.rank != 0):
                    continue
                standing = superseded.standing(entry.rank, life, event)
                for name, value in (standing.values if standing else {}).items():
                    if event.step > latest.get(name, (-1, 0.0))[0]:
                        latest[name] = event.step, value
    return latest


def runs_table(runs: list[Run]) -> Grid:
    """A row per run."""
    grid = Grid(
        Column("run"),  # it is there to be copied
        Column("project", least=5),  # so that ids of our own making fit into 80 columns
        Column("state", least=7),
        Column("started", least=10),
        *(Column(name, right=True) for name in ("lasted", "ranks", "events", "lost")),
    )
    for run in runs:
        summary = run.summary
        lost = sum(sum(account.dropped.values()) + account.missing for account in run.accounts)
        grid.add(
            run.files.run_id,
            str(run.files.header.settings.get("project", "")),
            cell(run.state, _COLOUR.get(run.state, "yellow"))
            + cell(" (only spooled)" if run.only_spooled else "", "yellow")
            + cell(" (damaged)" if run.damage else "", "red"),
            moment(run.first_ns),
            _duration((run.last_ns - run.first_ns) / 1e9),
            str(summary.world_size),
            str(summary.events),
            str(lost),
        )
    return grid


def ledger_table(accounts: list[Ledger]) -> Grid:
    """Where the events of each rank are: logged = journal + spooled + dropped (+ on the way)."""
    grid = Grid(
        Column("rank", right=True),
        Column("host", least=8),
        Column("state", least=9),
        *(Column(name, right=True) for name in ("logged", "journal", "spooled")),
        Column("dropped", right=True, least=8),
        *(Column(name, right=True) for name in ("on the way", "missing")),
    )
    for account in accounts:
        lives = f" ({account.lives} lives)" if account.lives > 1 else ""
        grid.add(
            str(account.rank),
            account.host,
            cell(account.state + lives, _COLOUR.get(account.state, "red")),
            str(account.logged),
            str(account.written),
            str(account.spooled),
            ", ".join(f"{number}: {reason}" for reason, number in account.dropped.items()) or "0",
            str(account.on_the_way),
            str(account.missing),
        )
    return grid


def describe(run: Run, rejected: Mapping[int, int]) -> Iterator[str]:
    """A run in a few lines; ``rejected`` as in :meth:`Run.as_json`."""
    summary, settings = run.summary, run.files.header.settings
    name = settings.get("experiment_name") or run.files.run_id
    state = f"{run.state}, only spooled" if run.only_spooled else run.state
    yield f"{settings.get('project', '?')} / {name} ({settings.get('mode', '?')}): {state}"
    if summary.finished and summary.finished.error:
        yield f"  {first_line(summary.finished.error)}"
    yield f"  from {moment(run.first_ns)} to {moment(run.last_ns)}, {many(summary.world_size, 'rank')}"
    yield from _places(run)
    if summary.closed is not None:
        closed = summary.closed
        complete = "complete" if closed.complete and not closed.thinned else "not complete"
        yield (
            f"  SwanLab ({complete}): {many(closed.written, 'scalar')} written, {closed.thinned} thinned, "
            f"{closed.withheld} withheld; {_place(summary) or 'nowhere'}"
        )
        if closed.late:
            yield f"  late: {many(closed.late, 'value')} that came after their step was written"
        if closed.repeated:
            yield f"  repeated: {many(closed.repeated, 'value')} that their rank had logged before at a step"
        if closed.completions:
            yield (
                f"  completions: {many(closed.completions, 'row')}, {closed.completions_dropped} more than the tables' "
                f"bound; see them with: swanlab-ray show {shlex.quote(run.files.run_id)} --completions"
            )
    elif place := _place(summary):
        yield f"  SwanLab: {place}"
    if refused := sum(account.refused for account in with_rejected(run.accounts, rejected)):
        yield f"  refused: {refused} values or calls that were wrong, each named once in its rank's output"
    for damaged in run.damage:
        yield f"  damaged: {damaged.path.name} at {damaged.damage.offset}: {damaged.damage.reason}"
    for alert in summary.alerts:
        yield f"  {moment(alert.time_ns)} {alert.text}"


def _places(run: Run) -> Iterator[str]:
    """Where the run's events lie, and what is to be done where no writer has them."""
    summary, spools = run.summary, len(run.files.spools)
    if not run.only_spooled:
        writers = len({(header.host, header.pid) for header in summary.headers if header.kind == "journal"})
        yield (
            f"  journal: {many(summary.events, 'event')}, {_size(summary.size)} in {many(summary.files, 'file')} of "
            f"{many(writers, 'writer')}, {run.files.paths[0].parent}"
        )
    else:
        directory = run.files.paths[0].parent
        why = "no writer took this run: its" if run.untaken else "the journal of this run is not here: the other"
        yield (
            f"  {why} {many(summary.events, 'event')} lie{'s' * (summary.events == 1)} in {many(spools, 'spool file')} "
            f"of its ranks, {_size(summary.size)}, {directory}; "
            f"upload them with: swanlab-ray sync {shlex.quote(str(directory))}"
        )
    if run.files.ambiguous:
        yield f"  {AMBIGUOUS}"


AMBIGUOUS = "its journals lie in several directories and count as one run: if they are two of the same id, name one"

_COLOUR = {"running": "cyan", "success": "green", "unfinished": "yellow"}


def _place(summary: Summary) -> str | None:
    places = [opened.url or opened.run_dir for opened in summary.opened if opened.url or opened.run_dir]
    return places[-1] if places else None


def moment(time_ns: int) -> str:
    """A time as the reader's clock shows it, such as ``2026-11-24 09:30:00``; a question mark where it is none."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_ns / 1e9)) if time_ns else "?"
    except (OverflowError, ValueError, OSError):  # of a clock that was wrong by ages
        return "?"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""
