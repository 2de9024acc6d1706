"""A disk whose machine can lose its power: of what was not synced, any pages may be on it afterwards."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

from tests.incarnations import MortalDisk

PAGE = 4096


class PowerDisk(MortalDisk):
    """Writes as any process does, into pages in memory that others can read; only a sync puts them on the disk.

    Syncs wait while there is no :attr:`current`, and fail while it is :attr:`sick`.
    """

    stored: dict[Path, bytes] = {}  # noqa: RUF012 - emptied by whoever uses it
    """What is on the disk for sure, by file."""
    sick = False

    def __init__(self) -> None:
        super().__init__()
        self._paths: dict[int, Path] = {}
        self._allowed = 1 << 60
        self._waiting = 0
        self._changed = threading.Condition()

    @property
    def waits(self) -> bool:
        """Whether a sync is waiting that may not pass."""
        with self._changed:
            return self._waiting > 0 and self._allowed <= 0

    def allow(self, syncs: int) -> None:
        """Let so many more syncs pass, and the others wait."""
        with self._changed:
            self._allowed = syncs
            self._changed.notify_all()

    def kill(self) -> None:
        """Whoever uses it ends at its next call; also who waits in one."""
        with self._changed:
            self.dead = True
            self._changed.notify_all()

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self._paths[descriptor] = path
        self.stored[path] = b""
        return descriptor

    def sync(self, descriptor: int) -> None:
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._allowed > 0 or self.dead, 30)
            self._waiting -= 1
            self._allowed -= 1
        if self.dead:
            raise SystemExit
        if self.sick:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.make_durable(self._paths[descriptor])

    def make_durable(self, path: Path) -> None:
        self.stored[path] = path.read_bytes()

    def truncate(self, descriptor: int, size: int) -> None:
        if self.dead:
            raise SystemExit
        super().truncate(descriptor, size)

    def remove(self, path: Path) -> None:
        if self.dead:
            raise SystemExit
        super().remove(path)
        self.stored.pop(path, None)


def lose_power(kept: Callable[[int], list[bool]]) -> int:
    """Nobody may be writing any more. ``kept(count)`` decides of that many pages whether they reached the disk, and of
    one thing more, whether a file has its new size. Returns how many pages were in doubt."""
    doubtful = 0
    for path, before in PowerDisk.stored.items():
        if not path.exists():
            continue
        now = path.read_bytes()
        places = [at for at in range(0, max(len(now), len(before)), PAGE) if _page(now, at) != _page(before, at)]
        *choices, resized = kept(len(places) + 1)
        doubtful += len(places)
        content = bytearray(before.ljust(len(now), b"\0"))
        for place, choice in zip(places, choices, strict=True):
            if choice:
                content[place : place + PAGE] = _page(now, place).ljust(len(_page(bytes(content), place)), b"\0")
        path.write_bytes(content[: len(now) if resized else len(before)])
        PowerDisk.stored[path] = path.read_bytes()
    return doubtful


def _page(content: bytes, place: int) -> bytes:
    return content[place : place + PAGE]
