"""A Ray cluster that the agent starts for a run, where none is meant, and that ends with it."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from swanlab_ray.actors.log import log
from swanlab_ray.actors.wire.locks import hold_lock, nobody_holds
from swanlab_ray.actors.wire.secret_shapes import masked
from swanlab_ray.observer.ray_cluster import directories, patches

GRACE_S = 4.0
"""Nobody may wait for it this long while it starts."""
POLL_S = 0.5
START_S = 270.0
"""Less than a rank waits for the cluster."""
ALARM_S = 15.0
TOLD_S = 0.5
"""How long those that wait have to be told why, before this process ends."""
# The actor's log is looked at while it runs.
ENVIRONMENT = {"PYTHONUNBUFFERED": "1"} | patches.DRIVER_ENVIRONMENT | patches.CLUSTER_ENVIRONMENT
ESSENTIAL = ("gcs_server", "raylet")


class Cluster:
    """Its head is a child of this process.

    Args:
        directory: of the agent.
        tell: takes the reason where it has to be given up, with this process.
    """

    def __init__(self, directory: Path, tell: Callable[[str], None]) -> None:
        self._directory = directory
        self._tell = tell
        self._started = threading.Event()
        self.session = directories.new_session(directory.parent)
        """Directory of Ray's session."""
        hold_lock(str(self.session / "agent"))

    def start(self, dashboard: bool, deadline: float = START_S) -> Any:
        """Start it, on the main thread; Ray may wait for what has died without end, so that is looked after.

        Args:
            dashboard: whether it has one.
            deadline: seconds.

        Returns:
            What ``ray.init`` returns.
        """
        for name in (patches.RUNTIME_ENV_HOOK, "RAY_ADDRESS"):  # the training's; Ray would heed them here as well
            os.environ.pop(name, None)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ[patches.UV_HOOK] = "0"
        if "RAY_AUTH_MODE" not in os.environ:  # a token for this cluster alone, unless the user has decided otherwise
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        # Where Ray keeps all threads of Python from running, the kernel ends this process; its children go with it.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(deadline + ALARM_S))
        threading.Thread(target=self._watch, args=(deadline,), name="starting", daemon=True).start()
        try:
            return self._init(dashboard)
        except Exception as error:
            log(masked("".join(traceback.format_exception(error))))
            self._give_up(" ".join(f"{type(error).__name__}: {error}".split())[:300])
        finally:
            self._started.set()
            signal.alarm(0)

    def _init(self, dashboard: bool) -> Any:
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
            _temp_dir=str(self.session),
            log_to_driver=False,
        )

    def check(self) -> None:
        """End this process where the cluster has lost what it cannot do without: the next agent starts all anew."""
        dead = _dead_children()
        if dead:
            self._give_up(f"{dead[0]} has ended")

    def remove(self) -> None:
        """Remove what it has left on disk."""
        shutil.rmtree(self.session, ignore_errors=True)

    def _watch(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        unused_since: float | None = None
        while not self._started.wait(POLL_S):
            now = time.monotonic()
            unused_since = (unused_since or now) if nobody_holds(str(self._directory / "alive")) else None
            dead = _dead_children()
            if dead:
                self._give_up(f"{dead[0]} has ended while the cluster started")
            elif now >= deadline:
                self._give_up(f"it did not start within {seconds:.0f} s")
            elif unused_since is not None and now - unused_since >= GRACE_S:
                self._give_up("nobody waits for it any more")

    def _give_up(self, why: str) -> None:
        self._tell(why)
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
        time.sleep(TOLD_S)
        self.remove()
        os._exit(1)


def _dead_children() -> list[str]:
    """Names of what a cluster cannot do without, and that has ended."""
    dead = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() in ESSENTIAL and child.status() == psutil.STATUS_ZOMBIE:
                dead.append(child.name())
    return dead
