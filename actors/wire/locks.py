"""A lock that says "this process lives", and the identity of the machine whose processes are seen."""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import suppress


def hold_lock(path: str) -> int:
    """Hold a shared lock on a file for as long as this process lives, however it dies. Returns the descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    # A POSIX record lock: unlike flock, it does not outlive the process in a forked child.
    fcntl.lockf(descriptor, fcntl.LOCK_SH)
    _held[descriptor] = os.getpid(), *_file(os.fstat(descriptor))
    return descriptor


def release_lock(descriptor: int) -> None:
    """Let others have it."""
    _held.pop(descriptor, None)
    with suppress(OSError):
        os.close(descriptor)


def nobody_holds(path: str) -> bool:
    """Whether no process holds the lock, this one included."""
    try:
        if _held_here(os.stat(path)):
            return False  # closing another descriptor of that file would release the lock
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def holder(path: str) -> int | None:
    """Process id of one that holds the lock, where this process can see it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    kind, _, _, _, pid = struct.unpack(_FLOCK, answer)
    return pid if kind != fcntl.F_UNLCK and pid > 0 else None


_FLOCK = "hhqqi4x"
"""``struct flock`` of 64-bit Linux: type, whence, start, length, process."""
_held: dict[int, tuple[int, int, int]] = {}
"""By descriptor, the process that holds the lock (a fork's child does not) and the file."""


def _held_here(state: os.stat_result) -> bool:
    for descriptor, held in list(_held.items()):
        try:
            if held == (os.getpid(), *_file(state)) and _file(os.fstat(descriptor)) == _file(state):
                return True
        except OSError:  # its user has closed it
            _held.pop(descriptor, None)
    return False


def _file(state: os.stat_result) -> tuple[int, int]:
    return state.st_dev, state.st_ino


def pid_namespace() -> str:
    """Identifies the machine and container whose process ids this process sees."""
    try:
        with open(
            "/proc/sys/kernel/random/boot_id"
        ) as boot:  # the namespace alone has the same number on every machine
            return f"{boot.read().strip()}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{os.uname().nodename}:{os.getpid()}"
