"""What a rank cannot send, on its own disk: files of the journal's format, read back in order when the writer returns.

They lie beside the run's journal where this machine sees that directory, so that ``swanlab-ray sync`` finds both.
"""

from __future__ import annotations

import errno
import os
import shlex
import socket
import stat
import tempfile
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from swanlab_ray.actors.journal import framing
from swanlab_ray.actors.journal.files import Appender, Disk, journal_files, run_directory
from swanlab_ray.actors.journal.records import Batch, Entry, Header, pack, unpack
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.messages import NumberedBatch
from swanlab_ray.actors.wire.version import package_version

SPOOL_BYTES = 4 << 30
"""Bytes that may wait here; what a rank logs beyond that is dropped and counted."""
SEGMENT_BYTES = 64 << 20
"""Size at which a file is followed by the next one; a file goes when the writer has all that is in it."""


class _Place(NamedTuple):
    offset: int
    end: int
    seq: int
    events: int


@dataclass(slots=True)
class _Segment:
    file: Appender
    places: deque[_Place] = field(default_factory=deque)
    """Of batches that are not acknowledged."""
    unread: int = 0
    """How many of the last of them have not been read back."""


class Spool:
    """Batches of one life of one rank, put aside in the order of their numbers.

    Every method may raise OSError.
    """

    def __init__(self, settings: ObserverSettings, run_id: str, rank: int, life: str, disk: Disk | None = None) -> None:
        self._settings = settings
        self._run_id = run_id
        self._rank = rank
        self._life = life
        self._disk = disk or Disk()
        self._segments: deque[_Segment] = deque()
        self._made = 0  # segments
        self.closed = False
        """What is in it is kept for good."""

    @property
    def path(self) -> Path | None:
        """The latest file, once there is one."""
        return self._segments[-1].file.path if self._segments else None

    @property
    def unread(self) -> int:
        """Batches that have not been read back."""
        return sum(segment.unread for segment in self._segments)

    @property
    def first(self) -> int | None:
        """The number of the oldest batch that is not acknowledged."""
        return next((segment.places[0].seq for segment in self._segments if segment.places), None)

    def put(self, batch: NumberedBatch, held: bool = False) -> None:
        """Add a batch, the last so far. ``held``: it is in the window as well, and need not be read back."""
        waiting = sum(segment.file.size for segment in self._segments)
        if waiting + len(batch.data) > SPOOL_BYTES:
            raise OSError(errno.EFBIG, f"{waiting} bytes wait there, {SPOOL_BYTES} are the most", str(self.path))
        if not self._segments or self._segments[-1].file.size >= SEGMENT_BYTES:
            self._begin_segment()
        segment = self._segments[-1]
        begin = segment.file.size
        record = Batch(self._rank, self._life, batch.seq, time.time_ns(), batch.events, batch.data)
        (end,) = segment.file.append([pack(record)])
        segment.places.append(_Place(begin, end, batch.seq, batch.events))
        segment.unread += not held

    def read(self) -> NumberedBatch:
        """The oldest batch that was not read back yet."""
        segment, place = self._next_unread()
        for found in framing.read(segment.file.path, place.offset, place.end):
            if isinstance(found, framing.Record):
                record = unpack(found.payload)
                if isinstance(record, Batch) and record.seq == place.seq:
                    segment.unread -= 1
                    return NumberedBatch(record.seq, record.events, record.data)
        raise OSError(errno.EIO, f"it is damaged at {place.offset}", str(segment.file.path))

    def acknowledged(self, below: int) -> None:
        """The writer has all batches below this number. Files of which nothing is needed are removed."""
        for segment in list(self._segments):
            while segment.places and segment.places[0].seq < below:
                segment.places.popleft()
                segment.unread = min(segment.unread, len(segment.places))
            if segment.places:
                return
            self._segments.remove(segment)
            segment.file.close()
            with suppress(OSError):
                self._disk.remove(segment.file.path)

    def give_up_first(self) -> tuple[int, int]:
        """Number and events of the oldest batch that was not read back, which cannot be."""
        segment, place = self._next_unread()
        segment.unread -= 1
        return place.seq, place.events

    def close(self, *last: Entry) -> None:
        """Keep what was not acknowledged, on the disk for good, and with it how this rank began and ended."""
        if self._segments and not self.closed:
            self.closed = True
            file = self._segments[-1].file
            file.append([pack(entry) for entry in last])
            file.sync()
            file.close()

    def _next_unread(self) -> tuple[_Segment, _Place]:
        segment = next(segment for segment in self._segments if segment.unread)
        return segment, segment.places[-segment.unread]

    def _begin_segment(self) -> None:
        """Begin the next file; the one before is on the disk for good by then."""
        if self._segments:
            self._segments[-1].file.sync()
            self._segments[-1].file.close()
        header = Header(
            kind="spool",
            run_id=self._run_id,
            epoch=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            settings=self._settings.public(),
            package=package_version(),
        )
        name = f"spool-{self._rank}-{self._life}-{self._made:04d}.log"
        try:
            file = self._create(run_directory(self._settings.log_dir, self._run_id) / name, header)
        except OSError:  # log_dir is the writer's; this machine may have none
            elsewhere = _own(Path(tempfile.gettempdir()) / f"swanlab-ray-spool-{os.getuid()}")
            file = self._create(run_directory(elsewhere, self._run_id) / name, header)
        self._segments.append(_Segment(file))
        self._made += 1

    def _create(self, path: Path, header: Header) -> Appender:
        self._disk.make_directory(path.parent)
        file = Appender(path, header, self._disk)
        path.chmod(0o600)  # what the model was shown and has said is nobody else's
        return file


def _own(directory: Path) -> Path:
    """Make a directory of this user's alone, in a place where everybody may make some.

    Raises:
        PermissionError: somebody else has made it, or a link that leads elsewhere.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "it is not this user's own directory", str(directory))
    directory.chmod(0o700)  # it may have been made by an earlier version
    return directory


def how_to_upload(spool: Path, met_a_writer: bool) -> str:
    """What a user can do with a spool that its rank could not hand over.

    Args:
        spool: one of its files.
        met_a_writer: its rank had one, whose journal may lie on another machine.
    """
    command = f"`swanlab-ray sync {shlex.quote(str(spool.parent))}`"
    if journal_files(spool.parent):
        return f"{command} uploads them with the run"
    if met_a_writer:
        return "copy the files to the run's journal on the writer's machine, where `swanlab-ray sync` uploads both"
    return f"{command} uploads them; if other ranks had a writer, copy the files to its journal first"
