"""What a machine gives: a disk that takes a run, and ports that other machines may reach."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from swanlab_ray.actors.runs.disks import file_system, nearest
from swanlab_ray.actors.settings import SettingsError, check_writable
from swanlab_ray.observer.agent.reach import listen
from swanlab_ray.observer.doctor.finding import Finding, phrase

LEAST_BYTES = 1 << 30
"""Of free space: what a long run with many ranks needs."""
SLOW_SYNC_S = 0.1
"""Events are acknowledged once they are on disk; a rank keeps what was not."""
SYNCS = 10


def examine_disk(log_dir: Path) -> Iterator[Finding]:
    """Where the runs of this machine lie, or its spools where the writer is on another one."""
    try:
        check_writable(log_dir)
        seconds = _sync_time(log_dir)
        kind = file_system(log_dir) or "a disk"
        free = shutil.disk_usage(nearest(log_dir)).free
    except SettingsError as error:
        yield Finding("wrong", "log_dir", phrase(error))
        return
    except OSError as error:
        yield Finding("wrong", "log_dir", f"'{log_dir}' cannot be written ({error.strerror}): set OBSERVER_LOG_DIR")
        return
    told = f"{log_dir}: {kind}, {free / 1e9:.0f} GB free, an fsync takes {1e3 * seconds:.1f} ms"
    if free < LEAST_BYTES:
        yield Finding("wrong", "log_dir", f"{told}: make room, or set OBSERVER_LOG_DIR to a larger disk")
    elif seconds > SLOW_SYNC_S:
        yield Finding("note", "log_dir", f"{told}: that is slow, a local disk would acknowledge events sooner")
    else:
        yield Finding("ok", "log_dir", told)


def examine_ports() -> Iterator[Finding]:
    """Whether there is one at which the agents of other machines could reach this one."""
    try:
        listening, _ = listen()
    except (OSError, ValueError) as error:
        yield Finding("wrong", "ports", f"{error}; other machines could not report to this one")
        return
    port = listening.getsockname()[1]
    listening.close()
    given = os.environ.get("OBSERVER_PORTS", "").strip()
    if given:
        yield Finding("ok", "ports", f"{port} is free, of OBSERVER_PORTS {given}")
    else:
        yield Finding("ok", "ports", "any that is free; for a firewall set OBSERVER_PORTS, such as 20000-20100")


def _sync_time(log_dir: Path) -> float:
    """Seconds, the median."""
    took = []
    with tempfile.TemporaryFile(dir=nearest(log_dir)) as file:
        for _ in range(SYNCS):
            os.write(file.fileno(), bytes(4096))
            began = time.perf_counter()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - began)
    return statistics.median(took)
