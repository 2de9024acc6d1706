"""Process that holds a private Ray cluster: starts it, and ends it when no rank and no writer lives any more.

Started by a rank as ``python -m swanlab_ray.observer.ray_cluster.keeper [--no-dashboard] DIRECTORY``. It is a process
of its own so that the cluster outlives the rank that happened to start it, even one that is killed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any

import psutil

from swanlab_ray.actors.wire.locks import hold_lock, nobody_holds
from swanlab_ray.observer.ray_cluster import directories
from swanlab_ray.observer.ray_cluster.guards import UV_HOOK

GRACE_S = 4.0
"""The lock may be free this long: a restarted writer needs about two seconds."""
POLL_S = 0.5
RAYLET_DEADLINE_S = 240.0
START_S = 270.0
"""Less than a rank waits for the cluster."""
ALARM_S = 15.0
TOUCH_S = 600.0
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",  # the actor's log is looked at while it runs
    # Ray gives up a node that does not answer for 15 s. This one is alone: giving it up would end the observation.
    "RAY_health_check_failure_threshold": "100",
    # Ray ends a worker, and starts another, that has not imported everything within 60 s: on such a machine, for ever.
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_agent_register_timeout_ms": "600000",
    # Where memory is short Ray ends workers, and the only one here is the writer.
    "RAY_memory_monitor_refresh_ms": "0",
    # Ray's 15 leaves the writer a thirtieth of a core beside a training that takes all; it must answer all the same.
    "RAY_worker_niceness": "5",
    "RAY_prestart_worker_first_driver": "0",  # the writer's worker belongs to another job
}
LISTEN_PORT = "dashboard_agent_listen_port"
AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", LISTEN_PORT)
PORTS = range(20_000, 65_536)
"""Below, Ray has ports of its own."""
LAUNCHERS_PORTS = range(29_400, 29_600)
"""torchrun and Accelerate meet at 29400, 29500 and those that follow."""
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


def keep(directory: Path, lock: int, dashboard: bool) -> None:
    """Start the cluster, publish its address in ``directory/cluster``, wait until it is unused, end it.

    Args:
        lock: descriptor of ``directory/keeper``.
    """
    directories.sweep(directory.parent)
    os.environ.pop("RAY_RUNTIME_ENV_HOOK", None)  # the training's; Ray would call it here as well
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[UV_HOOK] = "0"  # below `uv run` Ray would pack the working directory and start the writer through uv
    session = directories.new_session(directory.parent)
    hold_lock(str(session / "keeper"))
    with Starting(directory, session):
        context = _start(session, dashboard)
    described = {
        "address": context.address_info["gcs_address"],
        "dashboard": context.dashboard_url or None,
        "environment": {name: os.environ[name] for name in AUTHENTICATION if name in os.environ},
    }
    unfinished = directory / "cluster.new"
    unfinished.touch(mode=0o600)
    unfinished.write_text(json.dumps(described))
    unfinished.rename(directory / "cluster")
    while True:
        _wait_until_unused(directory, session)
        # Nobody finds it any more under its name; then nobody can have come in between.
        ended = directories.put_away(directory, ["alive"])
        if ended is not None or not _is_ours(directory, lock) or nobody_holds(str(directory / "alive")):
            break
    import ray

    ray.shutdown()
    if ended is not None:
        shutil.rmtree(ended, ignore_errors=True)
    shutil.rmtree(session, ignore_errors=True)


def _is_ours(directory: Path, lock: int) -> bool:
    """Whether a directory is the one this keeper was started for; another can have been made in its place."""
    try:
        return os.path.samestat(os.fstat(lock), (directory / "keeper").stat())
    except OSError:
        return False


class Starting:
    """Around the start of the cluster, which Ray may wait for without end: gives up, whatever has died of it.

    It ends this process with what that has started, and leaves the reason in ``directory/failed`` for the ranks.
    """

    def __init__(self, directory: Path, session: Path, deadline: float = START_S) -> None:
        self._directory = directory
        self._session = session
        self._deadline = deadline
        self._done = threading.Event()

    def __enter__(self) -> None:
        # Where Ray keeps all threads of Python from running, the kernel ends this process; its children go with it.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(self._deadline + ALARM_S))
        threading.Thread(target=self._watch, name="swanlab-ray-start", daemon=True).start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._done.set()
        signal.alarm(0)
        if error is not None:
            traceback.print_exception(error)
            self._give_up(" ".join(f"{type(error).__name__}: {error}".split())[:300])

    def _watch(self) -> None:
        deadline = time.monotonic() + self._deadline
        unused_since: float | None = None
        while not self._done.wait(POLL_S):
            now = time.monotonic()
            unused_since = (unused_since or now) if nobody_holds(str(self._directory / "alive")) else None
            dead = _dead_children()
            if dead:
                self._give_up(f"{dead[0]} has ended while the cluster started")
            elif now >= deadline:
                self._give_up(f"it did not start within {self._deadline:.0f} s")
            elif unused_since is not None and now - unused_since >= GRACE_S:
                self._give_up("nobody waits for it any more")

    def _give_up(self, why: str) -> None:
        print(why, flush=True)
        with suppress(OSError):
            (self._directory / "failed").write_text(why)
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
        shutil.rmtree(self._session, ignore_errors=True)
        os._exit(1)


def _dead_children() -> list[str]:
    """Names of what a cluster cannot do without, and that has ended."""
    dead = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() in ("gcs_server", "raylet") and child.status() == psutil.STATUS_ZOMBIE:
                dead.append(child.name())
    return dead


def _start(session: Path, dashboard: bool) -> Any:
    import ray

    be_patient()
    leave_out_what_idles(dashboard)
    return ray.init(
        address="local",
        num_cpus=1,
        num_gpus=0,
        object_store_memory=100 << 20,
        # True would give up the whole cluster where the dashboard is slow or not installed.
        include_dashboard=None if dashboard else False,
        _temp_dir=str(session),
        log_to_driver=False,
    )


def leave_out_what_idles(dashboard: bool) -> None:
    """Let ``ray.init`` not start what nobody here uses; together it takes a third of a core from the training.

    That is the autoscaler, what carries workers' logs to a driver (the dashboard reads the files), and what Ray starts
    of a dashboard that is off.
    """
    with suppress(ImportError):  # another Ray
        from ray._private.node import Node

        for start in ("start_monitor", "start_log_monitor", *(() if dashboard else ("start_api_server",))):
            if hasattr(Node, start):
                setattr(Node, start, lambda *_, **__: None)


def be_patient() -> None:
    """Let ``ray.init`` wait for its raylet on a machine whose cores all train.

    Ray asks for it in a loop without a pause, which takes a core away from it, and gives up after 30 s.
    """
    from ray._private import services

    ask: Callable[..., Any] | None = getattr(services, "get_node", None)
    if ask is None:
        return  # another Ray, with its own idea of patience

    def ask_patiently(*args: Any, **kwargs: Any) -> Any:
        deadline = time.monotonic() + RAYLET_DEADLINE_S
        while True:
            try:
                return ask(*args, **kwargs)
            except RuntimeError:  # it has not registered yet
                if time.monotonic() >= deadline:
                    raise
            time.sleep(POLL_S)

    services.get_node = ask_patiently
    _choose_ports(services)


def _choose_ports(services: Any) -> None:
    """Tell a raylet the ports of its agents: it ends itself where they have not told them after 15 s.

    See ray-project/ray#65983. The port of one of them it reads from a file only, so that is there before.
    """
    from ray import _raylet

    persist: Callable[..., Any] | None = getattr(_raylet, "persist_port", None)
    start: Callable[..., Any] | None = getattr(services, "start_raylet", None)
    if persist is None or start is None or not {*AGENT_PORTS, "node_id"} <= signature(start).parameters.keys():
        return  # another Ray

    def start_with_ports(*args: Any, **kwargs: Any) -> Any:
        given = signature(start).bind(*args, **kwargs).arguments
        given |= dict(zip(AGENT_PORTS, _free_ports(len(AGENT_PORTS)), strict=True))
        persist(given["session_dir"], given["node_id"], LISTEN_PORT, given[LISTEN_PORT])
        return start(**given)

    services.start_raylet = start_with_ports


def _free_ports(count: int) -> list[int]:
    """Ports that no connection is given by chance until the agents take them: a raylet dies of one that is taken."""
    first, last = 32_768, 60_999
    with suppress(OSError, ValueError):
        first, last = map(int, EPHEMERAL.read_text().split())
    quiet = [port for port in PORTS if port not in LAUNCHERS_PORTS and not first <= port <= last]
    ports: list[int] = []
    for port in [*random.sample(quiet, len(quiet)), *random.sample(PORTS, len(PORTS))]:
        if len(ports) == count:
            break
        if port in ports:
            continue
        with socket.socket() as one, suppress(OSError):
            one.bind(("", port))
            ports.append(port)
    return ports


def _wait_until_unused(directory: Path, session: Path) -> None:
    unused_since: float | None = None
    touched = 0.0
    while True:
        time.sleep(POLL_S)
        now = time.monotonic()
        if not nobody_holds(str(directory / "alive")):
            unused_since = None
            if now - touched >= TOUCH_S:
                touched = now
                for place in (directory, session):
                    with suppress(OSError):  # a file goes while they are listed
                        directories.keep_young([place, *place.rglob("*")])
            continue
        unused_since = unused_since or now
        if now - unused_since >= GRACE_S or (directory / "over").exists():
            return


def main() -> None:
    directory = Path(sys.argv[-1])
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C is for the training; the cluster ends after it
    if not directories.made_here(directory):
        sys.exit(f"{directory} is none of our directories.")
    try:
        os.getcwd()
    except FileNotFoundError:  # somebody has removed that of the training, and Ray asks for it
        os.chdir(directory.parent)
    lock = hold_lock(str(directory / "keeper"))
    os.utime(directory / "keeper")  # when this began
    keep(directory, lock, "--no-dashboard" not in sys.argv)


if __name__ == "__main__":
    main()
