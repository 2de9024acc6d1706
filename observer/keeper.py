"""Process that holds a private Ray cluster: starts it, and ends it when no rank and no writer lives any more.

Started by a rank as ``python -m swanlab_ray.observer.keeper DIRECTORY``. It is a process of its own so that the
cluster outlives the rank that happened to start it, even one that is killed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from swanlab_ray.actors.locks import hold_lock, nobody_holds

GRACE_S = 4.0
"""The lock may be free this long: a restarted writer needs about two seconds."""
POLL_S = 0.5
AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


def keep(directory: Path) -> None:
    """Start the cluster, publish its address in ``directory/cluster``, wait until it is unused, end it."""
    _sweep(directory)
    # The actor's log is looked at while it runs.
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    import ray

    temporary = directory.parent / f"r{os.getpid()}"
    context = ray.init(
        address="local",
        num_cpus=1,
        num_gpus=0,
        object_store_memory=100 << 20,
        include_dashboard=importlib.util.find_spec("aiohttp_cors") is not None,
        _temp_dir=str(temporary),
        log_to_driver=False,
    )
    described = {
        "address": context.address_info["gcs_address"],
        "dashboard": context.dashboard_url or None,
        "environment": {name: os.environ[name] for name in AUTHENTICATION if name in os.environ},
    }
    unfinished = directory / "cluster.new"
    unfinished.touch(mode=0o600)
    unfinished.write_text(json.dumps(described))
    unfinished.rename(directory / "cluster")
    ended = directory.parent / f"ended-{os.getpid()}"
    while True:
        _wait_until_unused(directory / "alive")
        # Nobody finds it any more under its name; then nobody can have come in between.
        directory.rename(ended)
        if nobody_holds(str(ended / "alive")):
            break
        ended.rename(directory)
    ray.shutdown()
    shutil.rmtree(ended, ignore_errors=True)
    shutil.rmtree(temporary, ignore_errors=True)


def _sweep(own: Path) -> None:
    """Remove what keepers that were killed have left behind."""
    for path in own.parent.iterdir():
        if path.name.startswith("r") and path.name[1:].isdigit():
            left = not Path(f"/proc/{path.name[1:]}").exists()
        else:
            # Closing a lock file of our own would release it, so our directory is not looked at.
            # A new one is left alone: its first rank may not hold its lock yet.
            old = path != own and time.time() - path.stat().st_mtime > 60
            left = old and nobody_holds(str(path / "keeper")) and nobody_holds(str(path / "alive"))
        if left:
            shutil.rmtree(path, ignore_errors=True)


def _wait_until_unused(alive: Path) -> None:
    unused_since: float | None = None
    while True:
        time.sleep(POLL_S)
        if not nobody_holds(str(alive)):
            unused_since = None
            for file in alive.parent.iterdir():
                os.utime(file)  # some machines clean /tmp by age
            continue
        unused_since = unused_since or time.monotonic()
        if time.monotonic() - unused_since >= GRACE_S:
            return


def main() -> None:
    directory = Path(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C is for the training; the cluster ends after it
    hold_lock(str(directory / "keeper"))
    keep(directory)


if __name__ == "__main__":
    main()
