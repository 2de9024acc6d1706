"""Where Ray comes from: one that is initialised, a cluster that runs, or one the ranks of a single node start.

A cluster that ranks start lives in a directory of its own, named by the run id::

    <temp>/swanlab-ray-<uid>/<run id>/
        starting    lock: who starts the keeper
        keeper      lock: held by the keeper, the process that holds the cluster
        alive       lock: held by every rank and by the writer; when nobody holds it any more, the cluster ends
        cluster     its address and token, written when it is up
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import logging
import os
import secrets
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swanlab_ray.actors.locks import hold_lock, nobody_holds
from swanlab_ray.actors.protocol import NAMESPACE
from swanlab_ray.observer.exits import run_exit_handler_first
from swanlab_ray.observer.guards import process_unchanged, set_environment

START_DEADLINE_S = 300.0
CONNECT_DEADLINE_S = 5.0


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


class NoCluster(ConnectionError):
    """There is no Ray to report to. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray cluster this process is connected to."""

    address: str
    ours: bool
    """This process initialised Ray, so it also shuts it down."""
    life_lock: str | None = None
    """The lock file of a cluster that the ranks started for themselves."""


def private_directory(run_id: str) -> Path:
    """Directory of the cluster that the ranks of this run start for themselves."""
    return private_root() / run_id


def private_root() -> Path:
    """Where such directories lie, of this user only. Short, since Ray's socket paths have 107 bytes at most.

    Raises:
        NoCluster: somebody else has made it.
    """
    root = Path("/tmp") / f"swanlab-ray-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.lstat().st_uid != os.getuid() or root.is_symlink() or root.stat().st_mode & 0o077:
        raise NoCluster(f"{root} is not this user's alone: remove it, or set RAY_ADDRESS to a cluster.")
    return root


def attach(run_id: str, nodes: int, dashboard: bool = True) -> Cluster:
    """Connect this rank to Ray: the initialised one, ``RAY_ADDRESS``, a running cluster, or a private one.

    Args:
        run_id: names the private cluster, which is started where there is none.
        nodes: machines of the job; a private cluster serves one machine only.
        dashboard: whether a private cluster has one.

    Raises:
        NoCluster: none can be reached.
    """
    set_environment()
    if importlib.util.find_spec("ray") is None:
        raise NoCluster("Ray is not installed: pip install 'ray>=2.50'.")
    initialised = sys.modules.get("ray")
    if initialised is not None and initialised.is_initialized():
        return Cluster(initialised.get_runtime_context().gcs_address, ours=False)
    address = running_address()
    if address:
        return _join(address)
    if nodes > 1:
        raise NoCluster(
            f"No Ray cluster is reachable and the job runs on {nodes} machines: start one (ray start --head, and "
            "ray start --address=HEAD:6379 on the others) and set RAY_ADDRESS=HEAD:6379 on every rank."
        )
    directory = start_private(run_id, dashboard)
    _wait_started(directory)
    return _join(_private_address(directory), str(directory / "alive"))


def attach_watcher(run_id: str | None) -> Cluster:
    """Connect this process to the cluster where a run, or any run, reports; never starts one.

    Raises:
        NoCluster: there is none, or several private ones and no run id to tell which.
    """
    set_environment()
    private = [
        path.parent.name for path in sorted(private_root().glob("*/cluster")) if _answers(_described(path)["address"])
    ]
    if run_id is None:
        address = running_address()
        if address is None and not private:
            raise NoCluster("No run is in progress on this machine, and RAY_ADDRESS names no cluster to look at.")
        if address is None and len(private) > 1:
            raise NoCluster(f"Several runs are in progress, name one: {', '.join(private)}.")
        return _join(address or _private_address(private_directory(private[0])))
    if run_id in private:
        return _join(_private_address(private_directory(run_id)))
    address = running_address()
    if address is None:
        known = f" (in progress: {', '.join(private)})" if private else ""
        raise NoCluster(f"No run '{run_id}' is in progress on this machine{known}, and RAY_ADDRESS is not set.")
    return _join(address)


def _private_address(directory: Path) -> str:
    described = _described(directory / "cluster")
    os.environ.update(described["environment"])  # before Ray is imported, which reads it only then
    return str(described["address"])


def running_address() -> str | None:
    """Address of the cluster that is meant: ``RAY_ADDRESS``, else the one ``ray start`` noted on this machine.

    Raises:
        NoCluster: ``RAY_ADDRESS`` is set but nobody answers there.
    """
    given = os.environ.get("RAY_ADDRESS", "")
    if given and given != "auto":
        if "://" in given:
            raise NoCluster(f"RAY_ADDRESS='{given}' is a Ray Client address; ranks need the cluster's HOST:6379.")
        if not _answers(given):
            raise NoCluster(f"The Ray cluster at RAY_ADDRESS='{given}' cannot be reached: check host and port.")
        return given
    # Other jobs' private clusters are never noted here, so they are never joined by accident.
    noted = Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    try:
        # A cluster that somebody else has noted would get this user's data and API key.
        address = noted.read_text().strip() if given or noted.stat().st_uid == os.getuid() else ""
    except OSError:
        address = ""
    if address and _answers(address):
        return address
    if given:
        raise NoCluster("RAY_ADDRESS='auto', but no Ray cluster runs on this machine: ray start --head.")
    return None


def detach(cluster: Cluster) -> None:
    """Leave Ray, if this process joined it for the observer only."""
    if not cluster.ours:
        return
    import ray

    with process_unchanged():
        ray.shutdown()


def reachable(cluster: Cluster) -> bool:
    """Whether the cluster's GCS answers. Ray's own calls would wait for it without end."""
    return _answers(cluster.address)


def _join(address: str, life_lock: str | None = None) -> Cluster:
    with process_unchanged():
        import ray

        logging.getLogger("ray").setLevel(
            logging.ERROR
        )  # it warns that it could not take over SIGTERM, as it should not
        run_exit_handler_first()  # Ray's own exit handler, registered by its import, would cut the connection
        try:
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                configure_logging=False,
                logging_level="ERROR",
                job_config=ray.job_config.JobConfig(
                    metadata={"job_name": f"swanlab-ray rank {os.environ.get('RANK', '0')}"}
                ),
            )
        except Exception as error:
            raise NoCluster(f"The Ray cluster at '{address}' refused this process: {_brief(error)}") from error
    return Cluster(address, ours=True, life_lock=life_lock)


def _described(file: Path) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(file.read_text())
    return described


def start_private(run_id: str, dashboard: bool) -> Path:
    """Start the private cluster of a run unless somebody has; it ends some time after this process. Does not wait."""
    directory = private_directory(run_id)
    directory.mkdir(mode=0o700, exist_ok=True)
    _hold(directory / "alive")
    _start_keeper(directory, dashboard)
    return directory


def _wait_started(directory: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while not (directory / "cluster").exists():
        if nobody_holds(str(directory / "keeper")):
            raise NoCluster(f"The Ray cluster of this run could not be started: see {directory / 'keeper.log'}.")
        if time.monotonic() >= deadline:
            raise NoCluster(
                f"The Ray cluster of this run did not start within {START_DEADLINE_S:.0f} s: see "
                f"{directory / 'keeper.log'}."
            )
        time.sleep(0.05)


def _start_keeper(directory: Path, dashboard: bool) -> None:
    """Start the keeper of the cluster, unless one lives."""
    with open(directory / "starting", "a") as starting:
        fcntl.lockf(starting, fcntl.LOCK_EX)
        if not nobody_holds(str(directory / "keeper")):
            return
        (directory / "cluster").unlink(missing_ok=True)  # of a keeper that was killed
        options = [] if dashboard else ["--no-dashboard"]
        with open(directory / "keeper.log", "ab") as log:
            # Not subprocess, which waits until a pipe is closed: a worker that the training forks meanwhile would keep
            # that open for as long as it lives.
            keeper = os.posix_spawn(
                sys.executable,
                # The directory comes last: by it a keeper is found.
                [sys.executable, "-ISc", _DETACH, "-m", "swanlab_ray.observer.keeper", *options, str(directory)],
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
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ranks_own
        and not name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_", "OMP_", "SWANLAB_", "OBSERVER_"))
    }
    return kept | {"CUDA_VISIBLE_DEVICES": ""}


def _authentication() -> dict[str, str]:
    """A token for this cluster alone, unless the user has decided otherwise, or Ray was imported without one."""
    if "RAY_AUTH_MODE" in os.environ:
        return {}
    if "ray" in sys.modules:
        return {"RAY_AUTH_MODE": "disabled"}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


_held: dict[Path, int] = {}


def _hold(path: Path) -> None:
    """Hold the lock until this process ends; opened once, since closing any other descriptor would release it."""
    descriptor = _held.get(path)
    if descriptor is None or not path.exists() or os.fstat(descriptor).st_ino != path.stat().st_ino:
        _held[path] = hold_lock(str(path))


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_DEADLINE_S).close()
    except (OSError, ValueError):
        return False
    return True


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
