"""Process that holds a private Ray cluster: starts it, and ends it when no rank and no writer lives any more.

Started by a rank as ``python -m swanlab_ray.observer.ray_cluster.keeper [--no-dashboard] DIRECTORY``. It is a process
of its own so that the cluster outlives the rank that happened to start it, even one that is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from swanlab_ray.actors.wire.locks import hold_lock, nobody_holds
from swanlab_ray.observer.ray_cluster import directories, patches

GRACE_S = 4.0
"""The lock may be free this long: a restarted writer needs about two seconds."""
POLL_S = 0.5
START_S = 270.0
"""Less than a rank waits for the cluster."""
ALARM_S = 15.0
TOUCH_S = 600.0
# The actor's log is looked at while it runs.
ENVIRONMENT = {"PYTHONUNBUFFERED": "1"} | patches.CLUSTER_ENVIRONMENT
AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


def keep(directory: Path, lock: int, dashboard: bool) -> None:
    """Start the cluster, publish its address in ``directory/cluster``, wait until it is unused, end it.

    Args:
        lock: descriptor of ``directory/keeper``.
    """
    directories.sweep(directory.parent)
    os.environ.pop(patches.RUNTIME_ENV_HOOK, None)  # the training's; Ray would call it here as well
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[patches.UV_HOOK] = "0"
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

    patches.be_patient()
    patches.leave_out_what_idles(dashboard)
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
