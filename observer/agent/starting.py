"""The agent of a run on this machine, as a rank sees it: found or started, looked after while it starts, and left.

It has a directory named by the run id (see directories)::

    /tmp/swanlab-ray-<uid>/<run id>/
        starting    lock: who starts the agent
        agent       lock: held by the agent
        alive       lock: held by every rank, and by the writer of a cluster that the agent has started; when nobody
                    holds it any more, the agent ends
        socket      where the agent listens
        cluster     the address of its Ray cluster, and the token, written when it is up
        over        the run has ended, so that no writer is restarted any more
"""

from __future__ import annotations

import fcntl
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from swanlab_ray.actors.wire.locks import hold_lock, holder, nobody_holds, release_lock
from swanlab_ray.observer.ray_cluster import directories
from swanlab_ray.observer.ray_cluster.addresses import NoCluster
from swanlab_ray.observer.script.descriptors import occupy_standard_descriptors

START_DEADLINE_S = 300.0
"""How long a rank waits for an agent that starts a cluster; that gives up before."""
STOPPED_S = 10.0
"""An agent that stands still (SIGSTOP) this long while somebody waits for it is ended."""
STARTED_S = 60.0
"""How long it may take until its process is there."""
AGAIN_S = (5.0, 300.0)
"""First and longest pause before a cluster that could not be started is tried again; it doubles."""
POLL_S = 0.02
AGENT = "swanlab_ray.observer.agent.process"
UNSTARTED = "Unstarted"
"""The agent's answer where it could not start a cluster, and ends."""


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
the agent must outlive the rank that happened to start it."""


class Agent:
    """The agent of a run on this machine.

    Args:
        run_id: of the run.
        dashboard: whether a cluster that it starts has one.

    Raises:
        NoCluster: it has no place on this machine.
    """

    def __init__(self, run_id: str, dashboard: bool) -> None:
        self._run_id = run_id
        self.directory = directories.directory_for(run_id)
        self._options = [] if dashboard else ["--no-dashboard"]
        self._stopped_since: float | None = None

    @property
    def log(self) -> Path:
        """What it and Ray have said."""
        return self.directory / "agent.log"

    def begin(self, deadline: Callable[[], float] = lambda: math.inf) -> None:
        """Start it if need be, and keep it for as long as this process lives.

        Raises:
            NoCluster: another process is starting it, and takes too long.
        """
        _hold(self.directory / "alive")
        (self.directory / "over").unlink(missing_ok=True)
        self._start(deadline)

    def connect(self, deadline: Callable[[], float]) -> socket.socket:
        """Connect to it, and start it before if need be.

        Args:
            deadline: says until when (monotonic) it may take.

        Raises:
            NoCluster: it cannot be started, or is not tried again yet.
        """
        failures, again = _failures.get(self.directory, (0, 0.0))
        if time.monotonic() < again and self._ended():
            raise NoCluster(f"The Ray cluster of this run could not be started, {failures} times: see {self.log}.")
        occupy_standard_descriptors()
        self.directory = directories.directory_for(self._run_id)  # it may have been removed
        self.begin(deadline)
        began = time.monotonic()
        while True:
            ended = self._ended()
            try:
                return _connected(self.directory / "socket")
            except OSError as error:  # it does not listen yet
                if ended:
                    raise NoCluster(self.failed("the observer's agent has ended")) from error
            if time.monotonic() >= deadline():
                raise NoCluster(f"The observer's agent on this machine had not started yet: see {self.log}.")
            self.look(began)
            time.sleep(POLL_S)

    def look(self, began: float) -> None:
        """Look after it, while somebody waits for it since ``began`` (monotonic; infinity: it may take any time).

        Raises:
            NoCluster: it was stopped, or takes too long, so it was ended.
        """
        now = time.monotonic()
        self._stopped_since = (self._stopped_since or now) if self._is_stopped() else None
        if now - began >= START_DEADLINE_S or (self._stopped_since and now - self._stopped_since >= STOPPED_S):
            self._stopped_since = None
            self._end()
            raise NoCluster(
                f"The observer's agent on this machine did not answer, or was stopped, so it was ended: see {self.log}."
            )

    def leave(self, over: bool) -> None:
        """Let it end, as far as this process is concerned; soon where the run is over."""
        if over:
            with suppress(OSError):
                (self.directory / "over").touch(mode=0o600)
        descriptor = _held.pop((os.getpid(), self.directory / "alive"), None)
        if descriptor is not None:
            release_lock(descriptor)

    def works(self) -> None:
        """It has found or started Ray."""
        _failures.pop(self.directory, None)

    def failed(self, why: str) -> str:
        """It could not start Ray, and ends; the next one waits longer and longer. Returns the sentence for the user."""
        failures = _failures.get(self.directory, (0, 0.0))[0] + 1
        _failures[self.directory] = failures, time.monotonic() + min(AGAIN_S[1], AGAIN_S[0] * 2 ** (failures - 1))
        return f"The Ray cluster of this run could not be started: {why}; see {self.log}."

    def why_gone(self) -> str:
        """What there is to say when it is gone."""
        return f"The observer's agent on this machine has ended: see {self.log}."

    def _ended(self) -> bool:
        return nobody_holds(str(self.directory / "agent"))

    def _pid(self) -> int | None:
        """Its process id, where this process sees it."""
        pid = holder(str(self.directory / "agent"))
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if pid else []
        except OSError:
            return None
        return pid if AGENT.encode() in arguments and os.fsencode(self.directory) in arguments else None

    def _is_stopped(self) -> bool:
        pid = self._pid()
        try:
            return pid is not None and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
        except OSError:
            return False

    def _end(self) -> None:
        """What it has started ends with it."""
        pid = self._pid()
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _start(self, deadline: Callable[[], float]) -> None:
        """Start it, unless it lives."""
        with open(self.directory / "starting", "a") as starting:
            until = time.monotonic() + STARTED_S
            while not _locked(starting.fileno()):
                if time.monotonic() >= min(until, deadline()):
                    raise NoCluster(f"Another rank is starting the observer's agent, and was stopped: see {self.log}.")
                time.sleep(POLL_S)
            if not self._ended():
                return
            for left in ("cluster", "socket"):  # of one that was killed
                (self.directory / left).unlink(missing_ok=True)
            with open(self.log, "ab") as log:
                # Not subprocess, which waits until a pipe is closed: a worker that the training forks meanwhile would
                # keep that open for as long as it lives.
                agent = os.posix_spawn(
                    sys.executable,
                    # The directory comes last: by it an agent is found.
                    [sys.executable, "-ISc", _DETACH, "-m", AGENT, *self._options, str(self.directory)],
                    _environment(),
                    file_actions=[
                        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                        (os.POSIX_SPAWN_DUP2, log.fileno(), 1),
                        (os.POSIX_SPAWN_DUP2, log.fileno(), 2),
                    ],
                    setsigmask=[],
                    setsigdef=[signal.SIGPIPE, signal.SIGTERM],
                )
            until = time.monotonic() + STARTED_S
            while self._ended() and _lives(agent) and time.monotonic() < until:
                time.sleep(POLL_S)


_failures: dict[Path, tuple[int, float]] = {}
"""How often a cluster could not be started, and when (monotonic) to try again."""


def _connected(path: Path) -> socket.socket:
    one = socket.socket(socket.AF_UNIX)
    try:
        one.connect(str(path))
    except OSError:
        one.close()
        raise
    return one


def _locked(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _lives(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG)[0] == 0
    except ChildProcessError:  # it has ended, and somebody else has asked
        return False


def _environment() -> dict[str, str]:
    """The rank's environment without what tells it that it is a rank, and without its GPUs."""
    ranks_own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    # A library's warning would end the agent, and the writer, which are nobody's to debug.
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
        if name == "OBSERVER_PORTS"
        or (
            name not in ranks_own
            and name not in debugging
            and not name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_", "OMP_", "SWANLAB_", "OBSERVER_", "RAY_JOB_"))
        )
    }
    return kept | {"CUDA_VISIBLE_DEVICES": ""}


_held: dict[tuple[int, Path], int] = {}
"""By process, since a fork's child has the descriptors and not the locks."""


def _hold(path: Path) -> None:
    """Hold the lock until this process ends; opened once, since closing any other descriptor would release it."""
    descriptor = _held.get((os.getpid(), path))
    if descriptor is None or not path.exists() or os.fstat(descriptor).st_ino != path.stat().st_ino:
        if descriptor is not None:
            release_lock(descriptor)
        _held[os.getpid(), path] = hold_lock(str(path))
