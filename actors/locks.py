"""A lock that says "this process lives", and the identity of the machine whose processes are seen."""

from __future__ import annotations

import fcntl
import os


def hold_lock(path: str) -> int:
    """Hold a shared lock on a file for as long as this process lives, however it dies. Returns the descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    # A POSIX record lock: unlike flock, it does not outlive the process in a forked child.
    fcntl.lockf(descriptor, fcntl.LOCK_SH)
    return descriptor


def nobody_holds(path: str) -> bool:
    """Whether no process holds the lock."""
    try:
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


def pid_namespace() -> str:
    """Identifies the machine and container whose process ids this process sees."""
    try:
        with open(
            "/proc/sys/kernel/random/boot_id"
        ) as boot:  # the namespace alone has the same number on every machine
            return f"{boot.read().strip()}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{os.uname().nodename}:{os.getpid()}"
