"""Whether somebody is at work on a run's files: a process of this machine, or of another that sees the same disk."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path

from swanlab_ray.actors.journal import framing
from swanlab_ray.actors.journal.files import being_written
from swanlab_ray.actors.journal.records import Batch, Closed, Ended, Entry, Header, UnknownFormat, unpack

STILL_S = 300.0
"""A journal on another machine's disk whose last record is older than this is nobody's any more; a writer that lives
writes one a minute at least."""
_TAIL = 4 << 20
"""Bytes in which the last record is looked for first: more than any but the largest."""


@dataclass(frozen=True, slots=True)
class AtWork:
    """Who is at work on a file."""

    path: Path
    host: str
    pid: int
    age: float | None
    """Seconds since the last record; None: it is a process of this machine, which holds the file's lock."""

    def __str__(self) -> str:
        heard = "on this machine" if self.age is None else f"whose last record is {max(0.0, self.age):.0f} s old"
        return f"process {self.pid} on {self.host or 'an unknown host'}, {heard}"


def at_work(path: Path, header: Header) -> AtWork | None:
    """Who writes a file at present, as far as that can be told; None: nobody.

    A lock tells of processes of this machine. It need not of others', nor does every disk have locks: then the age of
    the last record decides, unless that is the last one there can be.
    """
    locked = being_written(path)
    if locked:
        return AtWork(path, header.host, header.pid, None)
    if locked is False and header.host == socket.gethostname():
        return None
    last = _last_entry(path)
    if last is None or isinstance(last, (Closed, Ended) if header.kind == "spool" else Closed):
        return None
    age = time.time() - (last.received_ns if isinstance(last, Batch) else last.time_ns) / 1e9
    return AtWork(path, header.host, header.pid, age) if age < STILL_S else None


def _last_entry(path: Path) -> Entry | None:
    try:
        size = path.stat().st_size
        for start in sorted({max(0, size - _TAIL) // framing.BLOCK * framing.BLOCK, 0}, reverse=True):
            last = None
            for found in framing.read(path, start):
                if isinstance(found, framing.Record):
                    last = unpack(found.payload) or last
            if last is not None:
                return last
    except (OSError, UnknownFormat):
        pass
    return None
