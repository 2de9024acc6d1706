"""The journal: what the ranks sent, on disk before it is acknowledged.

A run's directory is ``<log_dir>/observer/<run id>/``. In it each incarnation of the writer creates the next
``journal-<epoch>.log`` exclusively and appends to no other. So a writer that still lives somewhere when its successor
has begun finds the higher epoch, and acknowledges nothing any more.

One thread writes: it takes all that waits, writes it, syncs it, looks for a higher epoch, and only then reports it as
committed (group commit). What a failed attempt has left behind is cut off, and the same records are written again: in
the same place where the disk was full, else in the next file, since after a failed sync nobody knows what is on the
disk. A file in which attempts have failed and nothing was committed is not left behind. Readers skip what they have
seen already.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from swanlab_ray.actors.journal.files import Appender, Disk, journal_files
from swanlab_ray.actors.journal.records import Batch, Entry, Header, pack

ROTATE_BYTES = 256 << 20
"""Size at which a file is followed by the next one."""
GROUP_BYTES = 8 << 20
"""Bytes in one write; what waits beyond that is in the next."""
RETRY_S = 1.0
"""Pause between two attempts to write when the disk refuses."""


class Position(NamedTuple):
    """A place between two records of a run's journal."""

    epoch: int
    offset: int


class Committed(NamedTuple):
    """An entry that is on disk, synced."""

    entry: Entry
    position: Position
    """After it."""


class Journal:
    """Writes the journal of one incarnation of the writer.

    Args:
        directory: the run's directory.
        header: makes the header of a file, given its epoch.
        on_trouble: called once when writing begins to fail, with the reason, and with None when it works again.
        on_fenced: called once a newer incarnation was found; nothing is committed any more.
    """

    def __init__(
        self,
        directory: Path,
        header: Callable[[int], Header],
        on_trouble: Callable[[OSError | None], None],
        on_fenced: Callable[[], None],
        disk: Disk | None = None,
    ) -> None:
        self.directory = directory
        self._header = header
        self._on_commit: Callable[[list[Committed]], None] = lambda committed: None
        self._on_trouble = on_trouble
        self._on_fenced = on_fenced
        self._disk = disk or Disk()
        self._file: Appender | None = None
        self._begun = False  # an epoch of its own
        self._troubled = False
        self._queue: deque[Entry] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self.epoch = 0
        """Of the file that is written now, or was last."""
        self.fenced = False
        self.queued_bytes = 0
        """Bytes of batches that wait to be written."""
        self.closed = threading.Event()
        self._appended = self._committed = 0  # entries
        self._waiters: list[tuple[int, threading.Event]] = []
        self._refused: OSError | None = None  # at the very beginning
        try:
            self._begin_file()
        except OSError as error:
            self._refused = error
        self.earlier = tuple(epoch for epoch in journal_files(directory) if not self.epoch or epoch < self.epoch)
        """Epochs of earlier incarnations. What is written there from now on is acknowledged by nobody."""
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)

    def start(self, on_commit: Callable[[list[Committed]], None]) -> None:
        """Begin to write what is appended; what is durable goes to ``on_commit``, on the journal's thread."""
        self._on_commit = on_commit
        if self._refused is not None:
            self._trouble(self._refused)
        self._thread.start()

    def earlier_files(self) -> list[Path]:
        """Those of earlier incarnations, in order."""
        files = journal_files(self.directory)
        return [files[epoch] for epoch in self.earlier if epoch in files]

    def make_durable(self, paths: list[Path]) -> None:
        """Sync these files, which others have written.

        Raises:
            OSError: that failed.
        """
        for path in paths:
            self._disk.make_durable(path)

    def append(self, *entries: Entry) -> None:
        """Queue entries, in order. Never blocks."""
        with self._wake:
            self._queue.extend(entries)
            self._appended += len(entries)
            self.queued_bytes += sum(len(entry.data) for entry in entries if isinstance(entry, Batch))
            self._wake.notify()

    def settled(self, timeout: float) -> bool:
        """Wait until all that is appended now is durable."""
        done = threading.Event()
        with self._wake:
            if self._committed >= self._appended:
                return True
            self._waiters.append((self._appended, done))
        return done.wait(timeout)

    def close(self, timeout: float) -> bool:
        """Write what is queued and close the file; False if that took longer than ``timeout`` seconds."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        return self.closed.wait(timeout)

    def _work(self) -> None:
        while group := self._take():
            while not (ends := self._commit(group)):
                if self.fenced or self._closing:
                    self.closed.set()
                    return
                time.sleep(RETRY_S)
            with self._wake:
                self.queued_bytes -= sum(len(entry.data) for entry in group if isinstance(entry, Batch))
            self._on_commit(
                [Committed(entry, Position(self.epoch, end)) for entry, end in zip(group, ends, strict=True)]
            )
            self._committed += len(group)
            with self._wake:
                for waiter in [waiter for waiter in self._waiters if waiter[0] <= self._committed]:
                    self._waiters.remove(waiter)
                    waiter[1].set()
        if self._file is not None:
            self._file.close()
        self.closed.set()

    def _take(self) -> list[Entry]:
        """What is to be written next; empty when the journal is to be closed."""
        with self._wake:
            while not self._queue and not self._closing:
                self._wake.wait()
            group: list[Entry] = []
            size = 0
            while self._queue and size < GROUP_BYTES:
                entry = self._queue.popleft()
                group.append(entry)
                size += len(entry.data) if isinstance(entry, Batch) else 200
            return group

    def _commit(self, group: list[Entry]) -> list[int]:
        """Make a group durable; empty if that failed."""
        if self.fenced:
            return []
        try:
            if self._file is not None and self._file.size > ROTATE_BYTES:
                self._file.close()
                self._file = None
            if self._file is None:
                self._begin_file()
            assert self._file is not None
            ends = self._file.append([pack(entry) for entry in group])
            self._file.sync()
            if self._disk.exists(self._path(self.epoch + 1)):
                self._fence()
                return []
            self._file.kept = self._file.size
        except FileExistsError:  # somebody else has begun the epoch that would have been ours
            self._fence()
            return []
        except OSError as error:
            self._give_up(error)
            self._trouble(error)
            return []
        if self._troubled:
            self._troubled = False
            self._on_trouble(None)
        return ends

    def _give_up(self, error: OSError) -> None:
        """Leave nothing of a failed attempt behind, and go on in the next file where this one is no good any more."""
        file = self._file
        if file is None:
            return
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if file.cut(file.kept) and not file.doubtful and (full or file.empty):
            return
        self._file = None
        file.close()
        if file.empty:
            with suppress(OSError):
                self._disk.remove(file.path)
                self.epoch -= 1

    def _begin_file(self) -> None:
        """Begin the next epoch; an incarnation's first one is beyond all that there are."""
        self._disk.make_directory(self.directory)
        while True:
            epoch = self.epoch + 1 if self._begun else max(journal_files(self.directory), default=0) + 1
            try:
                self._file = Appender(self._path(epoch), self._header(epoch), self._disk)
            except FileExistsError:
                if self._begun:
                    raise
                continue  # two incarnations begin at once, and this one comes second
            self.epoch, self._begun = epoch, True
            return

    def _fence(self) -> None:
        self.fenced = True
        if self._file is not None:
            self._file.close()
        self._on_fenced()

    def _trouble(self, error: OSError) -> None:
        if not self._troubled:
            self._troubled = True
            self._on_trouble(error)

    def _path(self, epoch: int) -> Path:
        return self.directory / f"journal-{epoch:06d}.log"
