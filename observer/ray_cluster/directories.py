"""Where the agents of a user's runs lie on this machine, and the removal of what killed ones have left.

Nothing is looked at, used or removed but what this user has made here: a root that nobody else can enter, and directly
below it directories that carry our mark. Who lives is told by locks: process ids are another container's perhaps.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from swanlab_ray.actors.wire.locks import nobody_holds
from swanlab_ray.observer.ray_cluster.addresses import NoCluster

MARK = ".swanlab-ray"
"""File in each directory that was made here; it holds the run's id, or nothing in a session of Ray."""
LOCKS = ("agent", "alive")
"""A directory is in use while one of these files in it is locked."""
NEW_S = 60.0
"""A directory this young is left alone: who has just made it may not hold its lock yet."""
ROOM_BYTES = 32 << 20
"""Free space that a cluster needs at least; most of it is logs."""
NAME_BYTES = 64
"""Of a longer run id the directory has a digest for its name: the agent's socket has to fit as well."""
SOCKET_PATH_BYTES = 107
"""Linux's limit."""
RAYS_PATH = "/r{0}-ff/session_2026-01-01_00-00-00_000000_{0}/sockets/plasma_store"
"""The longest that Ray's sockets are called below a root, given a process id."""


def roots() -> list[Path]:
    """Where they may lie, in the order in which that is tried: the same for all ranks of a machine."""
    places = ["/tmp", os.environ.get("TMPDIR"), os.environ.get("XDG_RUNTIME_DIR"), "/var/tmp", "/dev/shm"]
    named = [os.path.normpath(place) for place in places if place and os.path.isabs(place)]
    return [Path(place, f"swanlab-ray-{os.getuid()}") for place in dict.fromkeys(named)]


def directory_for(run_id: str) -> Path:
    """Directory of the cluster of a run, which is made where there is none: one in use, else in the first usable root.

    Raises:
        NoCluster: there is no such root.
    """
    name = _name(run_id)
    for root in roots():
        if made_here(root / name) and not _unused(root / name, LOCKS):
            return root / name
    found: list[str] = []
    for root in roots():
        try:
            _use(root)
            return _make(root / name, run_id)
        except OSError as error:
            found.append(f"{root.parent}: {error.strerror or error}")
    raise NoCluster(
        f"The observer's agent has no place on this machine ({'; '.join(found)}): set TMPDIR to a directory of this "
        "user with a short name and some space."
    )


def published() -> Iterator[tuple[str, Path]]:
    """Run id and directory of each cluster of this user that has told its address."""
    for root in roots():
        for path in _below(root):
            if made_here(path) and (path / "cluster").is_file():
                with suppress(OSError, UnicodeDecodeError):
                    run_id = (path / MARK).read_text()
                    if run_id:
                        yield run_id, path


def new_session(root: Path) -> Path:
    """A directory for a session of Ray, which nobody else has or had: another container may have our process id."""
    name = f"r{os.getpid()}"
    while True:
        path = root / name
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            name = f"r{os.getpid()}-{secrets.token_hex(1)}"
        else:
            return _make(path, "")


def made_here(path: Path) -> bool:
    """Whether this is a directory of ours, directly below a root of ours; a link to one is not."""
    if path.parent not in roots() or path.name in ("", ".", ".."):
        return False
    try:
        _check(path.parent)
        directory, mark = path.lstat(), (path / MARK).lstat()
    except OSError:
        return False
    ours = directory.st_uid == mark.st_uid == os.getuid()
    return ours and stat.S_ISDIR(directory.st_mode) and stat.S_ISREG(mark.st_mode)


def sweep(root: Path) -> None:
    """Remove what killed processes have left below a root. Whatever else lies there stays, and does not disturb."""
    for path in _below(root):
        with suppress(OSError):
            if made_here(path) and time.time() - path.lstat().st_mtime > NEW_S:
                remove_unused(path)


def remove_unused(path: Path) -> bool:
    """Remove a directory of ours unless somebody uses it; returns whether it is gone."""
    if not made_here(path) or not _unused(path, LOCKS):
        return False
    away = put_away(path)
    if away is None:
        return False
    shutil.rmtree(away, ignore_errors=True)
    return True


def put_away(path: Path, locks: Sequence[str] = LOCKS) -> Path | None:
    """Give a directory another name, so that nobody finds it any more; None where somebody has come to use it."""
    away = path.with_name(f"+{secrets.token_hex(4)}")
    try:
        path.rename(away)
    except OSError:  # another process is at it
        return None
    if _unused(away, locks):
        return away
    with suppress(OSError):  # else there is a new one already; who has this one finds out
        away.rename(path)
    return None


def keep_young(paths: Iterable[Path]) -> None:
    """Some machines clean /tmp by age."""
    for path in paths:
        with suppress(OSError):
            os.utime(path, follow_symlinks=False)


def _name(run_id: str) -> str:
    if run_id.strip(".") == "" or "/" in run_id or "\0" in run_id:
        raise NoCluster(f"The run id {run_id!r} is no name of a directory: choose another.")
    if len(os.fsencode(run_id)) > NAME_BYTES:
        return hashlib.sha256(os.fsencode(run_id)).hexdigest()[:NAME_BYTES]
    return f"{run_id}+" if re.fullmatch(r"r[0-9]+(-[0-9a-f]+)?", run_id) else run_id  # sessions have such names


def _unused(path: Path, locks: Sequence[str]) -> bool:
    return all(nobody_holds(str(path / lock)) for lock in locks)


def _below(root: Path) -> list[Path]:
    try:
        _check(root)
        return sorted(root.iterdir())
    except OSError:
        return []


def _use(root: Path) -> None:
    """Make a root if need be.

    Raises:
        OSError: it cannot be used. The text says why.
    """
    if len(os.fsencode(root)) + len(RAYS_PATH.format(_highest_pid())) > SOCKET_PATH_BYTES:
        raise OSError("its name is too long for Ray's sockets")
    _make_directory(root)
    _check(root)
    space = os.statvfs(root)
    if space.f_bavail * space.f_frsize < ROOM_BYTES:
        raise OSError(f"less than {ROOM_BYTES >> 20} MiB are free")
    probe = root / f"+{secrets.token_hex(4)}"
    with socket.socket(socket.AF_UNIX) as one:  # not every file system can
        one.bind(str(probe))
    probe.unlink()


def _highest_pid() -> str:
    try:
        return Path("/proc/sys/kernel/pid_max").read_text().strip()
    except OSError:
        return "4194304"


def _check(root: Path) -> None:
    state = root.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise OSError(f"{root.name} there is not this user's alone")


def _make(path: Path, run_id: str) -> Path:
    _make_directory(path)
    state = path.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
        raise OSError(f"{path.name} there is no directory of this user")
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path / MARK, flags, 0o600)
    try:
        os.write(descriptor, run_id.encode())
    finally:
        os.close(descriptor)
    return path


def _make_directory(path: Path) -> None:
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
        path.chmod(0o700)  # whatever the umask is
