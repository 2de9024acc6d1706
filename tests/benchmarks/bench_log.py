"""What one ``log()`` call costs the thread that trains: ours, SwanLab's, Trackio's, and a bare ``deque.append``.

Run it with: python -m tests.benchmarks.bench_log
All are measured in one process, in turns, so that a noisy machine is noisy for all of them.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

SIZES = (1, 10, 100)
ROUNDS = 8
CALLS = 1000
DRAIN_S = 0.5
"""Pause after each block, so that one candidate's background threads do not slow the next one down."""


def main() -> None:
    directory = Path(tempfile.mkdtemp())
    os.environ.update(RAY_AUTH_MODE="disabled", TRACKIO_DIR=str(directory / "trackio"), HF_HUB_OFFLINE="1")
    candidates = {"bare": bare(), "swanlab-ray": ours(directory), "swanlab": swanlab(directory), "trackio": trackio()}
    print(
        f"{'scalars':>8} "
        + " ".join(f"{name:>12}" for name in candidates)
        + f" {'/ bare':>8} {'x below best peer':>18}"
    )
    for size in SIZES:
        data = {f"train/metric_{index}": index * 1.1 for index in range(size)}
        medians = measure(candidates, data)
        ratio = medians["swanlab-ray"] / medians["bare"]
        gain = min(medians["swanlab"], medians["trackio"]) / medians["swanlab-ray"]
        print(
            f"{size:8d} " + " ".join(f"{medians[name]:9.2f} us" for name in candidates) + f" {ratio:8.1f} {gain:18.0f}"
        )
    os._exit(0)  # the peers' own exit handlers take long and are not measured


Log = Callable[[dict[str, float], int], None]


def measure(candidates: dict[str, Log], data: dict[str, float]) -> dict[str, float]:
    """Median over all calls, in microseconds."""
    times: dict[str, list[int]] = {name: [] for name in candidates}
    step = 0
    for _ in range(ROUNDS):
        for name, log in candidates.items():
            took = times[name]
            for _ in range(CALLS):
                step += 1
                began = time.perf_counter_ns()
                log(data, step)
                took.append(time.perf_counter_ns() - began)
            time.sleep(DRAIN_S)
    overhead = statistics.median(_empty() for _ in range(10_000))
    return {name: (statistics.median(took) - overhead) / 1e3 for name, took in times.items()}


def _empty() -> int:
    began = time.perf_counter_ns()
    return time.perf_counter_ns() - began


def bare() -> Log:
    """The floor: append the same tuple with a time and a copy of the dict."""
    events: deque[tuple[int, int, dict[str, float]]] = deque(maxlen=10_000)
    append, now = events.append, time.time_ns

    def log(data: dict[str, float], step: int) -> None:
        append((step, now(), dict(data)))

    return log


def ours(directory: Path) -> Log:
    from swanlab_ray.observer import connect

    observer = connect(project="bench", mode="offline", log_dir=directory / "ours")
    assert observer.wait_ready(120)
    return observer.log


def swanlab(directory: Path) -> Log:
    import swanlab as sdk

    settings = sdk.Settings(mode="offline", log_dir=directory / "swanlab", interactive=False)
    return sdk.init(project="bench", settings=settings).log  # type: ignore[no-any-return]


def trackio() -> Log:
    import trackio as sdk

    sdk.init(project="bench", name="bench")

    def log(data: dict[str, float], step: int) -> None:
        sdk.log(data, step=step)

    return log


if __name__ == "__main__":
    main()
