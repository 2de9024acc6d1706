"""The files of a journal: how they are called, who can read them, and one that only grows."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from pathlib import Path

from swanlab_ray.actors.journal.framing import frame
from swanlab_ray.actors.journal.records import Header, pack

_NAME = re.compile(r"journal-(\d{6,})\.log")


class Disk:
    """Every call that a journal makes to the file system, so that tests can let any of them fail."""

    def make_directory(self, path: Path) -> None:
        """A run's directory, which only its owner can read unless others can read the log directory that is there."""
        mode = _readable_by(path.parent.parent)
        for one in reversed([one for one in (path, *path.parents) if not one.is_dir()]):
            try:
                one.mkdir(mode)
            except FileExistsError:  # which elsewhere means that another writer was faster
                if not one.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(one)) from None

    def create(self, path: Path) -> int:
        """A new file, durable in its directory, to be read by whoever can read that. Raises FileExistsError if somebody
        else has created it."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(path, flags, _readable_by(path.parent) & 0o666)
        try:
            directory = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError:
            os.close(descriptor)
            self.remove(path)
            raise
        return descriptor

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        return os.pwrite(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        os.fdatasync(descriptor)

    def make_durable(self, path: Path) -> None:
        """Sync what some process has written there, living or dead."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def linked(self, descriptor: int) -> bool:
        """Whether the file still has a name: a file whose directory was removed takes data without complaint."""
        return os.fstat(descriptor).st_nlink > 0

    def truncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def exists(self, path: Path) -> bool:
        """Whether a file is there, also for another machine that has just made it."""
        os.close(os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC))  # else NFS answers from memory for a minute
        try:
            os.stat(path)
        except FileNotFoundError:
            return False
        return True

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)


def _readable_by(directory: Path) -> int:
    """The mode of a directory to be made in this one: its own, but writable by the owner only, and private in a place
    that is everybody's, such as /tmp, or that is not there yet."""
    try:
        mode = directory.stat().st_mode
    except OSError:
        return 0o700
    return 0o700 if mode & stat.S_ISVTX else 0o700 | mode & 0o055


def run_directory(log_dir: Path, run_id: str) -> Path:
    """Where the journal of a run lies."""
    return log_dir / "observer" / run_id


def journal_files(directory: Path) -> dict[int, Path]:
    """The journal files in a directory by epoch, in order."""
    try:
        names = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    except OSError:  # then writing fails as well, and says so
        return {}
    return dict(sorted(names))


def being_written(path: Path) -> bool | None:
    """Whether a living process of this machine appends to this file; None: its disk has no locks to tell."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False


class Appender:
    """One file of framed records that only grows. A journal has one per epoch, a rank's spool is one.

    Raises:
        OSError: from any method. What a failed append left behind is cut off, or overwritten by the next one.
    """

    def __init__(self, path: Path, header: Header, disk: Disk) -> None:
        self.path = path
        self.size = 0
        self.kept = 0
        """How much of it counts: for whoever appends to set."""
        self.doubtful = False
        """A sync has failed, so nobody knows what of it is on the disk."""
        self._disk = disk
        self._descriptor = disk.create(path)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # says that somebody is at work here
        except OSError:
            pass  # not every shared file system has locks
        try:
            self.append([pack(header)])
            self.sync()
        except OSError:
            self.close()
            disk.remove(path)
            raise
        self._begin = self.kept = self.size

    @property
    def empty(self) -> bool:
        """Whether nothing but its header counts."""
        return self.kept <= self._begin

    def append(self, payloads: list[bytes]) -> list[int]:
        """Write records; returns the offset after each. They are not durable before :meth:`sync`."""
        pieces, ends, offset = [], [], self.size
        for payload in payloads:
            pieces.append(frame(payload, offset))
            offset += len(pieces[-1])
            ends.append(offset)
        data, place = memoryview(b"".join(pieces)), self.size
        try:
            while data:
                written = self._disk.write(self._descriptor, data, place)
                if written <= 0:
                    raise OSError(errno.EIO, "nothing was written")
                data, place = data[written:], place + written
        except OSError:
            self.cut(self.size)
            raise
        self.size = offset
        return ends

    def cut(self, size: int) -> bool:
        """Give up what lies behind this offset; False if that cannot be done."""
        self.size = size
        try:
            self._disk.truncate(self._descriptor, size)
        except OSError:
            return False
        return True

    def sync(self) -> None:
        """Make what was written durable."""
        self.doubtful = True
        self._disk.sync(self._descriptor)
        if not self._disk.linked(self._descriptor):
            raise FileNotFoundError(errno.ENOENT, "the directory has vanished", str(self.path.parent))
        self.doubtful = False

    def close(self) -> None:
        """Close the file, once."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            try:
                self._disk.close(descriptor)
            except OSError:
                pass  # everything that counts was synced
