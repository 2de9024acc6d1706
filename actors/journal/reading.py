"""Reading a run back from its journal: entries in order, each batch once, and what is missing.

Nothing here needs a cluster, a writer or SwanLab.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from swanlab_ray.actors.journal import framing
from swanlab_ray.actors.journal.at_work import AtWork, at_work
from swanlab_ray.actors.journal.merging import interleave
from swanlab_ray.actors.journal.records import (
    Alert,
    Arrived,
    Batch,
    Closed,
    Counts,
    Delivered,
    Ended,
    Entry,
    Finished,
    Header,
    Notified,
    Opened,
    Returned,
    UnknownFormat,
    unpack,
)
from swanlab_ray.actors.journal.seen import InOrder, Sequence
from swanlab_ray.actors.journal.writing import Position, journal_files
from swanlab_ray.actors.wire.codec import Undecodable, decode_batch
from swanlab_ray.actors.wire.events import Outcome, State
from swanlab_ray.actors.wire.naming import is_run_id, run_id_of

TERMINATED = "SIGTERM"
"""How the error of a rank begins that was told to end."""
KILLED = "killed before it was sent"
"""Reason of a drop: the rank had counted these events, but died with them."""


@dataclass(frozen=True, slots=True)
class Damaged:
    """A place in a file that could not be read."""

    path: Path
    damage: framing.Damage


def entries(path: Path, start: int = 0, end: int | None = None) -> Iterator[tuple[int, Entry] | Damaged]:
    """The entries of one file with the offset after each, and its damage.

    Raises:
        UnknownFormat: the file is no journal, or of a newer version.
        OSError: it cannot be read.
    """
    for found in framing.read(path, start, end):
        if isinstance(found, framing.Damage):
            yield Damaged(path, found)
            continue
        try:
            entry = unpack(found.payload)
        except UnknownFormat as error:
            if found.offset == 0:
                raise UnknownFormat(f"'{path}' cannot be read: {error}") from None
            yield Damaged(path, framing.Damage(found.offset, found.end, str(error)))
            continue
        if start == 0 and found.offset == 0 and not isinstance(entry, Header):
            raise UnknownFormat(f"{path} is not a journal of swanlab-ray")
        if entry is not None:
            yield found.end, entry


class Follower:
    """Reads a journal from a place on, as far as it was committed, again and again.

    Args:
        directory: the run's directory.
        position: where to begin.
    """

    def __init__(self, directory: Path, position: Position) -> None:
        self.directory = directory
        self.position = position

    def read(self, until: Position) -> Iterator[Entry | Damaged]:
        """The entries from here to there. :attr:`position` moves along."""
        for epoch, path in journal_files(self.directory).items():
            if not self.position.epoch <= epoch <= until.epoch:
                continue
            start = self.position.offset if epoch == self.position.epoch else 0
            end = until.offset if epoch == until.epoch else None
            self.position = Position(epoch, start)
            for found in entries(path, start, end):
                if isinstance(found, Damaged):
                    yield found
                else:
                    self.position = Position(epoch, found[0])
                    yield found[1]
        self.position = max(self.position, until)


@dataclass(slots=True)
class Life:
    """What a journal says about one life of a rank."""

    began: int = 0
    """Where it stands among the lives of its rank: the time of the first that is heard of it, by a clock that is never
    set back."""
    arrived: Arrived | None = None
    ended: Ended | None = None
    next_seq: int = 0
    events: int = 0
    """In the batches that are there."""
    missing: list[tuple[int, int]] = field(default_factory=list)
    """Sequence numbers that damage took, as ranges with both ends."""
    last_batch: Batch | None = None

    def outcome(self) -> Outcome | None:
        """How this life said it had ended, if that was the last thing it said."""
        if self.last_batch is None:
            return None
        try:
            events, _ = decode_batch(self.last_batch.data)
        except Undecodable:
            return None
        last = events[-1] if events else None
        return last if isinstance(last, Outcome) and last.state is not None else None


@dataclass(slots=True)
class Summary:
    """A run as its files tell it, without looking into the batches."""

    headers: list[Header] = field(default_factory=list)
    lives: dict[tuple[int, str], Life] = field(default_factory=dict)
    opened: list[Opened] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)
    sessions: int = 0
    """Jobs that this run has had: one that had ended may be gone on with."""
    session_ns: int = 0
    """When the last of them began."""
    session_lives: set[str] = field(default_factory=set)
    """That it has had."""
    before_ns: int = 0
    """When the one before it had ended."""
    notified: set[str] = field(default_factory=set)
    """Keys of the notifications that it has sent."""
    finished: Finished | None = None
    closed: Closed | None = None
    rows: dict[int, int] = field(default_factory=dict)
    """Rows that SwanLab's cloud has confirmed, by the version of the reduction that made them."""
    damaged: list[Damaged] = field(default_factory=list)
    files: int = 0
    size: int = 0
    """Bytes of all files."""
    first_ns: int = 0
    last_ns: int = 0
    seen: Sequence = field(default_factory=Sequence)
    """The batches that are there."""
    _latest: int = 0  # of the file that is read, or of all journals

    def take(self, entry: Entry) -> None:
        """Count the next entry."""
        moment = entry.received_ns if isinstance(entry, Batch) else entry.time_ns
        if isinstance(entry, Header) and entry.kind == "spool":
            self._latest = 0
        self._latest = max(self._latest, moment)
        match entry:
            case Batch():
                self._take_batch(entry)
            case Header():
                self.headers.append(entry)
            case Arrived():
                if not self._take_arrived(entry):
                    return  # its spool tells again what the journal has told
            case Ended():
                self._life(entry).ended = entry
            case Returned():
                self._life(entry).ended = None
                self.finished = self.closed = None  # the run had not ended after all
            case Opened():
                self.opened.append(entry)
            case Alert():
                if entry not in self.alerts:
                    self.alerts.append(entry)
            case Notified():
                self.notified.add(entry.key)
            case Delivered():
                self.rows[entry.reduction_version] = max(self.rows.get(entry.reduction_version, 0), entry.rows)
            case Finished():
                self.finished = entry
            case Closed():
                self.closed = entry
        self.first_ns = min(self.first_ns or moment, moment)
        self.last_ns = max(self.last_ns, moment)

    def _life(self, entry: Batch | Arrived | Ended | Returned) -> Life:
        return self.lives.setdefault((entry.rank, entry.life), Life(self._latest))

    def _take_batch(self, batch: Batch) -> None:
        life = self._life(batch)
        if self.seen.take(batch):
            life.events += batch.events
            if life.last_batch is None or batch.seq >= life.last_batch.seq:
                life.last_batch = batch

    def _take_arrived(self, arrived: Arrived) -> bool:
        life = self._life(arrived)
        if life.arrived is not None:
            return False
        life.arrived = arrived
        if self.finished is not None or not self.sessions:
            self.sessions += 1
            self.session_ns = arrived.time_ns
            self.before_ns = self.finished.time_ns if self.finished is not None else 0
            self.notified.clear()
            self.session_lives.clear()
        self.session_lives.add(arrived.life)
        self.finished = self.closed = None  # a job that goes on has not ended
        return True

    @property
    def world_size(self) -> int:
        """As the last rank said that arrived."""
        lives = [life for life in self.lives.values() if life.arrived is not None]
        last = max(reversed(lives), key=lambda life: life.began, default=Life())
        return last.arrived.world_size if last.arrived else 0

    @property
    def events(self) -> int:
        """Events in the journal."""
        return sum(life.events for life in self.lives.values())

    def ranks(self) -> dict[int, list[Life]]:
        """The lives of each rank in the order of their beginning."""
        ranks: dict[int, list[Life]] = {}
        for (rank, _), life in sorted(self.lives.items(), key=lambda item: (item[0][0], item[1].began)):
            ranks.setdefault(rank, []).append(life)
        return ranks


def ledger(lives: list[Life]) -> tuple[int, Counts]:
    """The account of one rank over these lives: events in the journal, and what the rank counted itself.

    ``logged == written + spooled + sum(dropped)`` for lives that have ended.
    """
    written = logged = spooled = refused = 0
    dropped: dict[str, int] = {}
    for life in lives:
        counted = life.ended.counts if life.ended else Counts()
        written += life.events
        spooled += counted.spooled
        refused += counted.refused
        logged += max(counted.logged, life.events)
        for reason, number in counted.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + number
    return written, Counts(logged=logged, spooled=spooled, dropped=dropped, refused=refused)


def summarise(paths: list[Path]) -> Summary:
    """Read files of one run from end to end: every checksum, every sequence number.

    Args:
        paths: journal files in the order of their epochs, then spools.

    Raises:
        UnknownFormat: one of them is no journal, or of a newer version.
        OSError: one of them cannot be read.
    """
    summary = Summary()
    for path in paths:
        with suppress(FileNotFoundError):  # a spool is removed once the writer has it all
            summary.size += path.stat().st_size
            summary.files += 1
            for found in entries(path):
                if isinstance(found, Damaged):
                    summary.damaged.append(found)
                else:
                    summary.take(found[1])
    for key, numbers in summary.seen.lives.items():
        summary.lives[key].next_seq = numbers.next
        summary.lives[key].missing = numbers.missing()
    return summary


def ending(summary: Summary) -> tuple[State, str | None] | None:
    """How the run ended: as its writer said, or, where no writer was left to say it, as all of its ranks did."""
    if summary.finished is not None:
        return summary.finished.state, summary.finished.error
    ends = [lives[-1].ended for lives in summary.ranks().values()]
    known = [end for end in ends if end is not None]
    if not ends or len(known) < max(len(ends), summary.world_size):
        return None
    bad = sorted(
        (end for end in known if end.state != "success"),
        key=lambda end: ((end.error or "").startswith(TERMINATED), end.ended_ns),
    )
    if not bad:
        return "success", None
    first = bad[0]
    state: State = "aborted" if first.state == "aborted" else "crashed"
    return state, f"rank {first.rank}: {first.error or first.state}"


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The files of one run that were found under some paths."""

    run_id: str
    journals: list[Path]
    spools: list[Path]
    header: Header

    @property
    def paths(self) -> list[Path]:
        """Journals in order, then spools."""
        return self.journals + self.spools

    @property
    def ambiguous(self) -> bool:
        """Journals lie in several directories: of one run on several machines, or of two runs with one id."""
        return len({path.parent for path in self.journals}) > 1

    @property
    def at_work(self) -> AtWork | None:
        """Who writes it at present: its writer, or a rank its spool."""
        latest = {path.parent: path for path in self.journals}
        found = (at_work(path, read_header(path) or self.header) for path in [*latest.values(), *self.spools])
        return next((one for one in found if one is not None), None)

    @property
    def in_progress(self) -> bool:
        """Whether somebody is at work on it."""
        return self.at_work is not None


def find_runs(paths: list[Path]) -> list[RunFiles]:
    """The runs whose files lie at or under these paths: files, run directories, log directories.

    Files of one run that were collected from several machines are put together by their run id.

    Raises:
        FileNotFoundError: a path does not exist.
    """
    files: dict[str, dict[Path, Header]] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        if not os.access(path, os.R_OK if path.is_file() else os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        candidates = [path] if path.is_file() else [*path.rglob("journal-*.log"), *path.rglob("spool-*.log")]
        for candidate in candidates:
            header = _header_of(candidate)
            if header is not None:
                if not is_run_id(header.run_id):  # it is used as a name, and this file may be anybody's
                    header = header.model_copy(update={"run_id": run_id_of(header.run_id)})
                files.setdefault(header.run_id, {})[candidate.resolve()] = header
    runs = []
    for run_id, found in files.items():
        # Epochs count up within a directory; directories of machines that share none are told apart by time.
        begun: dict[Path, int] = {}
        for path, header in found.items():
            begun[path.parent] = min(begun.get(path.parent, header.time_ns), header.time_ns)
        order = sorted(found, key=lambda path: (begun[path.parent], str(path.parent), found[path].epoch, path.name))
        journals = [path for path in order if found[path].kind == "journal"]
        spools = [path for path in order if found[path].kind == "spool"]
        told = [found[path] for path in (journals or spools) if found[path].settings]
        runs.append(RunFiles(run_id, journals, spools, told[-1] if told else found[order[-1]]))
    return sorted(runs, key=lambda run: run.header.time_ns)


def _header_of(path: Path) -> Header | None:
    """What is known of a file before it is read: also of one that will be refused then, which costs no other."""
    try:
        header = read_header(path) if path.is_file() else None  # nobody waits for the other end of a pipe
    except UnknownFormat:
        header = None
    return header or _header_by_name(path)


def read_header(path: Path) -> Header | None:
    """The header of a file; None if it has none that can be read.

    Raises:
        UnknownFormat: it is of a newer version.
    """
    try:
        for found in framing.read(path):
            if isinstance(found, framing.Damage):
                return None
            entry = unpack(found.payload)
            return entry if isinstance(entry, Header) else None
    except OSError:
        pass
    return None


def _header_by_name(path: Path) -> Header | None:
    """What a file's name and place say, where its header is damaged: it must not be overlooked for that."""
    kind, _, number = path.stem.partition("-")
    number = number.partition("-")[0]
    if kind not in ("journal", "spool") or not number.isdigit() or path.suffix != ".log" or not path.is_file():
        return None
    return Header(
        kind="journal" if kind == "journal" else "spool",
        run_id=path.resolve().parent.name,
        epoch=int(number),
        host="",
        pid=0,
        settings={},
        time_ns=path.stat().st_mtime_ns,
    )


def merged(run: RunFiles) -> Iterator[Entry | Damaged]:
    """Everything that is known of a run: each batch once, and those of a life in the order of their numbers."""

    def read(path: Path) -> Iterator[Entry | Damaged]:
        with suppress(FileNotFoundError):  # a spool is removed once the writer has it all
            for found in entries(path):
                yield found if isinstance(found, Damaged) else found[1]

    order: InOrder[Entry] = InOrder()
    for found in interleave(run.journals, run.spools, read):
        if isinstance(found, Damaged):
            yield found
        else:
            yield from order.take(found, found)
    yield from order.rest()
