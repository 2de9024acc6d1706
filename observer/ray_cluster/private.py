"""The Ray cluster that the ranks of one machine start for themselves.

It lives in a directory of its own, named by the run id (see directories)::

    /tmp/swanlab-ray-<uid>/<run id>/
        starting    lock: who starts the keeper
        keeper      lock: held by the keeper, the process that holds the cluster
        alive       lock: held by every rank and by the writer; when nobody holds it any more, the cluster ends
        cluster     its address and token, written when it is up
        failed      why it could not be started
        over        the run has ended, so that no writer is restarted any more
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from swanlab_ray.actors.wire.locks import hold_lock, holder, nobody_holds, release_lock
from swanlab_ray.observer.ray_cluster import directories
from swanlab_ray.observer.ray_cluster.addresses import NoCluster

START_DEADLINE_S = 300.0
"""How long a rank waits for its private cluster; the keeper gives up before."""
STOPPED_S = 10.0
"""A keeper that stands still (SIGSTOP) this long while it starts is ended."""
AGAIN_S = (5.0, 300.0)
"""First and longest pause before a private cluster that could not be started is tried again; it doubles."""
KEEPER = "swanlab_ray.observer.ray_cluster.keeper"


_DETACH = """
import os, sys
os.setsid()
for descriptor in map(int, os.listdir("/proc/self/fd")):
    if descriptor > 2:
        try: os.close(descriptor)
        except OSError: pass
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""Leaves the rank's session, which the launcher kills, and what the rank has open, such as ports that NCCL listens on;
the cluster must outlive the rank that happened to start it."""


Deadline = Callable[[], float]
"""Says until when (monotonic) something may take; that changes when the training ends."""


def never() -> float:
    """The deadline of who has none."""
    return math.inf


def start_private(run_id: str, dashboard: bool) -> Path:
    """Start the private cluster of a run unless somebody has; it ends some time after this process. Does not wait.

    Raises:
        NoCluster: it has no place on this machine, or could not be started and is not tried again yet.
    """
    directory = directories.directory_for(run_id)
    failures, again = _failures.get(directory, (0, 0.0))
    if time.monotonic() < again and nobody_holds(str(directory / "keeper")):
        raise NoCluster(f"The Ray cluster of this run could not be started, {failures} times: {_why_failed(directory)}")
    _hold(directory / "alive")
    (directory / "over").unlink(missing_ok=True)
    _start_keeper(directory, dashboard)
    return directory


def described(directory: Path) -> dict[str, Any]:
    """Address, dashboard and environment of a private cluster that is up."""
    found: dict[str, Any] = json.loads((directory / "cluster").read_text())
    return found


def leave_private(directory: Path, over: bool = False) -> None:
    """Let the private cluster end, as far as this process is concerned; soon where the run is over."""
    if over:
        with suppress(OSError):
            (directory / "over").touch(mode=0o600)
    descriptor = _held.pop((os.getpid(), directory / "alive"), None)
    if descriptor is not None:
        release_lock(descriptor)


_failures: dict[Path, tuple[int, float]] = {}
"""How often a private cluster could not be started, and when (monotonic) to try again."""


def wait_started(directory: Path, deadline: Deadline) -> None:
    own = time.monotonic() + START_DEADLINE_S
    stopped_since: float | None = None
    while not (directory / "cluster").exists():
        now = time.monotonic()
        if nobody_holds(str(directory / "keeper")):
            failures = _failures.get(directory, (0, 0.0))[0] + 1
            _failures[directory] = failures, now + min(AGAIN_S[1], AGAIN_S[0] * 2 ** (failures - 1))
            raise NoCluster(f"The Ray cluster of this run could not be started: {_why_failed(directory)}")
        if now >= deadline():
            raise NoCluster(f"The Ray cluster of this run had not started yet: see {directory / 'keeper.log'}.")
        stopped_since = (stopped_since or now) if _is_stopped(directory) else None
        if now >= own or _too_old(directory) or (stopped_since and now - stopped_since >= STOPPED_S):
            _end_keeper(directory)
            raise NoCluster(
                f"The Ray cluster of this run did not start within {START_DEADLINE_S:.0f} s, or its keeper was "
                f"stopped, so it was ended: see {directory / 'keeper.log'}."
            )
        time.sleep(0.05)
    _failures.pop(directory, None)


def _why_failed(directory: Path) -> str:
    log = directory / "keeper.log"
    try:
        return f"{(directory / 'failed').read_text().strip()}; see {log}."
    except OSError:
        return f"its keeper has ended; see {log}."


def _too_old(directory: Path) -> bool:
    """Whether the keeper, which touches its lock when it begins, has had its time; another run may have started it."""
    try:
        return time.time() - (directory / "keeper").stat().st_mtime > START_DEADLINE_S
    except OSError:
        return False


def _keeper_of(directory: Path) -> int | None:
    """Process id of the keeper, where this process sees it."""
    pid = holder(str(directory / "keeper"))
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if pid else []
    except OSError:
        return None
    return pid if KEEPER.encode() in arguments and os.fsencode(directory) in arguments else None


def _is_stopped(directory: Path) -> bool:
    pid = _keeper_of(directory)
    try:
        return pid is not None and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def _end_keeper(directory: Path) -> None:
    """What it has started ends with it."""
    pid = _keeper_of(directory)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _start_keeper(directory: Path, dashboard: bool) -> None:
    """Start the keeper of the cluster, unless one lives."""
    with open(directory / "starting", "a") as starting:
        fcntl.lockf(starting, fcntl.LOCK_EX)
        if not nobody_holds(str(directory / "keeper")):
            return
        for left in ("cluster", "failed"):  # of a keeper that was killed
            (directory / left).unlink(missing_ok=True)
        options = [] if dashboard else ["--no-dashboard"]
        with open(directory / "keeper.log", "ab") as log:
            # Not subprocess, which waits until a pipe is closed: a worker that the training forks meanwhile would keep
            # that open for as long as it lives.
            keeper = os.posix_spawn(
                sys.executable,
                # The directory comes last: by it a keeper is found.
                [sys.executable, "-ISc", _DETACH, "-m", KEEPER, *options, str(directory)],
                _keeper_environment() | _authentication(),
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, log.fileno(), 1),
                    (os.POSIX_SPAWN_DUP2, log.fileno(), 2),
                ],
                setsigmask=[],
                setsigdef=[signal.SIGPIPE, signal.SIGTERM],
            )
        deadline = time.monotonic() + START_DEADLINE_S
        while nobody_holds(str(directory / "keeper")) and _lives(keeper) and time.monotonic() < deadline:
            time.sleep(0.02)


def _lives(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG)[0] == 0
    except ChildProcessError:  # it has ended, and somebody else has asked
        return False


def _keeper_environment() -> dict[str, str]:
    """The rank's environment without what tells it that it is a rank, and without its GPUs."""
    ranks_own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "RAY_ADDRESS")
    # A library's warning would end the keeper, and the writer, which are nobody's to debug.
    debugging = (
        "PYTHONOPTIMIZE",
        "PYTHONWARNINGS",
        "PYTHONDEVMODE",
        "PYTHONINSPECT",
        "PYTHONPROFILEIMPORTTIME",
        "PYTHONTRACEMALLOC",
    )
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ranks_own
        and name.removeprefix("PYTHON") not in debugging
        and not name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_", "OMP_", "SWANLAB_", "OBSERVER_", "RAY_JOB_"))
    }
    return kept | {"CUDA_VISIBLE_DEVICES": ""}


def _authentication() -> dict[str, str]:
    """A token for this cluster alone, unless the user has decided otherwise, or Ray was imported without one."""
    if "RAY_AUTH_MODE" in os.environ:
        return {}
    if "ray" in sys.modules:
        return {"RAY_AUTH_MODE": "disabled"}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


_held: dict[tuple[int, Path], int] = {}
"""By process, since a fork's child has the descriptors and not the locks."""


def _hold(path: Path) -> None:
    """Hold the lock until this process ends; opened once, since closing any other descriptor would release it."""
    descriptor = _held.get((os.getpid(), path))
    if descriptor is None or not path.exists() or os.fstat(descriptor).st_ino != path.stat().st_ino:
        _held[os.getpid(), path] = hold_lock(str(path))
