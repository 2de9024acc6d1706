"""What a rank cannot send, on its own disk: a file of the journal's format, read back in order when the writer returns.

It lies beside the run's journal where this machine sees that directory, so that ``swanlab-ray sync`` finds both.
"""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from swanlab_ray.actors import framing
from swanlab_ray.actors.journal import Appender, Disk, run_directory
from swanlab_ray.actors.records import Batch, Entry, Header, pack, unpack
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.version import package_version

SPOOL_BYTES = 4 << 30
"""Size that the file may have; what a rank logs beyond that is dropped and counted."""


class _Place(NamedTuple):
    offset: int
    end: int
    seq: int
    events: int


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
        self._file: Appender | None = None
        self._places: deque[_Place] = deque()
        self._closed = False
        self._read = 0  # of these, how many have been read back
        self.events = 0
        """Events in the batches that the writer has not acknowledged; kept by the channel."""

    @property
    def path(self) -> Path | None:
        """The file, once there is one."""
        return self._file.path if self._file else None

    @property
    def unread(self) -> int:
        """Batches that have not been read back."""
        return len(self._places) - self._read

    @property
    def first(self) -> int | None:
        """The number of the oldest batch that is not acknowledged."""
        return self._places[0].seq if self._places else None

    def put(self, seq: int, events: int, data: bytes, held: bool = False) -> None:
        """Add a batch, the last so far. ``held``: it is in the window as well, and need not be read back."""
        if self._file is None:
            self._file = self._create()
        if self._file.size + len(data) > SPOOL_BYTES:
            raise OSError(errno.EFBIG, f"it has {SPOOL_BYTES >> 30} GiB, the bound", str(self._file.path))
        begin = self._file.size
        batch = Batch(self._rank, self._life, seq, time.time_ns(), events, data)
        (end,) = self._file.append([pack(batch)])
        self._places.append(_Place(begin, end, seq, events))
        self._read += held

    def read(self) -> tuple[int, int, bytes]:
        """Number, events and data of the oldest batch that was not read back yet."""
        assert self._file is not None
        place = self._places[self._read]
        for found in framing.read(self._file.path, place.offset, place.end):
            if isinstance(found, framing.Record):
                batch = unpack(found.payload)
                if isinstance(batch, Batch) and batch.seq == place.seq:
                    self._read += 1
                    return batch.seq, batch.events, batch.data
        raise OSError(errno.EIO, f"it is damaged at {place.offset}", str(self._file.path))

    def acknowledged(self, below: int) -> None:
        """The writer has all batches below this number. A file of which nothing is needed is removed."""
        while self._places and self._places[0].seq < below:
            self._places.popleft()
            self._read -= 1
        if self._file is not None and not self._places:
            path = self._file.path
            self._file.close()
            self._file = None
            with suppress(OSError):
                self._disk.remove(path)

    def give_up_first(self) -> tuple[int, int]:
        """Number and events of the oldest batch that was not read back, which cannot be."""
        place = self._places[self._read]
        self._read += 1
        return place.seq, place.events

    def close(self, *last: Entry) -> None:
        """Keep what was not acknowledged, on the disk for good, and with it how this rank began and ended."""
        if self._file is not None and not self._closed:
            self._closed = True
            self._file.append([pack(entry) for entry in last])
            self._file.sync()
            self._file.close()

    def _create(self) -> Appender:
        header = Header(
            kind="spool",
            run_id=self._run_id,
            epoch=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            settings=self._settings.public(),
            package=package_version(),
        )
        name = f"spool-{self._rank}-{self._life}.log"
        try:
            return self._begin(run_directory(self._settings.log_dir, self._run_id) / name, header)
        except OSError:  # log_dir is the writer's; this machine may have none
            elsewhere = Path(tempfile.gettempdir()) / f"swanlab-ray-spool-{os.getuid()}"
            return self._begin(run_directory(elsewhere, self._run_id) / name, header)

    def _begin(self, path: Path, header: Header) -> Appender:
        self._disk.make_directory(path.parent)
        return Appender(path, header, self._disk)
