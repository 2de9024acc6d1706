"""A run as its files tell it: who was there, how it ended, what is missing. Nobody looks into the batches."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from swanlab_ray.actors.journal.reading import Damaged, entries
from swanlab_ray.actors.journal.records import (
    Alert,
    Arrived,
    Batch,
    Closed,
    Delivered,
    Ended,
    Entry,
    Finished,
    Header,
    Notified,
    Opened,
    Returned,
)
from swanlab_ray.actors.journal.seen import Sequence
from swanlab_ray.actors.runs.account import Account
from swanlab_ray.actors.runs.causes import failures, state_of
from swanlab_ray.actors.wire.codec import Undecodable, decode_batch
from swanlab_ray.actors.wire.events import Outcome, State
from swanlab_ray.actors.wire.messages import Counts

KILLED = "killed before it was sent"
"""Reason of a drop: the rank had counted these events, but died with them."""


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

    def account(self) -> Account:
        """What became of its events."""
        return Account.of(self.events, self.ended.counts if self.ended else Counts())

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


def ledger(lives: list[Life]) -> Account:
    """The account of one rank over these lives."""
    return sum((life.account() for life in lives), Account())


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
    bad = failures(known)
    return (state_of(bad[0]), f"rank {bad[0].rank}: {bad[0].error or bad[0].state}") if bad else ("success", None)
