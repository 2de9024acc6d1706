"""What stays flat: a rank whose writer is gone for ten minutes, and a writer that takes ten million scalars.

Run it with: python -m tests.benchmarks.bench_memory
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.bench_journal import Direct

AWAY_EVENTS = 10 * 60 * 10_000
"""Ten minutes at 10,000 events a second, as fast as this machine can."""
SOAK_CALLS = 1_000_000
SCALARS = 10


class Gone:
    """A link to nobody."""

    run_id = "bench"

    def open(self, hello: Any) -> Any:
        from swanlab_ray.observer.transport.link import LinkBroken

        raise LinkBroken("nobody is there")

    def close(self) -> None: ...


def megabytes() -> float:
    return float(psutil.Process().memory_info().rss / 2**20)


def away() -> None:
    """A rank alone: 64 MiB in memory, then its disk."""
    from swanlab_ray.actors.settings import ObserverSettings
    from swanlab_ray.observer.job.identity import Identity
    from swanlab_ray.observer.observer import Observer

    settings = ObserverSettings(project="bench", mode="offline", log_dir=tempfile.mkdtemp(), run_id="bench")
    observer = Observer(settings, Identity(0, 1, 0, 1), Gone())  # type: ignore[arg-type]
    before = highest = megabytes()
    for step in range(AWAY_EVENTS):
        observer.log({"loss": step * 0.1, "grad_norm": step * 0.2, "lr": 1e-4}, step)
        if step % 10_000 == 0:
            highest = max(highest, megabytes())
            while len(observer._queue) > 50_000:  # the flusher of a real rank has ten minutes
                observer._channel._flusher.wake.set()
                time.sleep(0.001)
    observer._channel._flusher.wake.set()
    counts = observer.statistics()
    (spool,) = settings.log_dir.rglob("spool-*.log")
    print(
        f"a rank without a writer, {counts.logged:,} events: {highest - before:.0f} MiB more in memory, "
        f"{spool.stat().st_size / 2**20:.0f} MiB on disk, dropped {counts.dropped}"
    )


def soak() -> None:
    """A writer with everything but SwanLab itself, whose memory is not ours."""
    from swanlab_ray.actors.delivery.sink import Row, Sink
    from swanlab_ray.actors.settings import ObserverSettings
    from swanlab_ray.actors.writer.actor import Writer
    from swanlab_ray.actors.writer.parts import Parts
    from swanlab_ray.observer.job.identity import Identity
    from swanlab_ray.observer.observer import Observer

    class Nowhere(Sink):
        def _write_some(self, first: Row) -> None:
            self.written += len(first.values)
            self._forget(1)

    Parts._make_sink = lambda self: Nowhere("offline", self.notices, self.notes.opened)  # type: ignore[method-assign]
    settings = ObserverSettings(project="bench", mode="offline", log_dir=tempfile.mkdtemp(), run_id="bench")
    writer = Writer("bench", settings)
    observer = Observer(settings, Identity(0, 1, 0, 1), Direct(writer))
    assert observer.wait_ready(10)
    process = psutil.Process()
    marks = []
    begin = time.perf_counter()
    for step in range(SOAK_CALLS):
        observer.log({f"metric_{n}": step * 0.1 + n for n in range(SCALARS)}, step)
        while len(observer._queue) > 20_000:
            time.sleep(0.001)
        if step % (SOAK_CALLS // 10) == SOAK_CALLS // 10 - 1:
            assert observer.flush(120)
            while writer.status().lag > 1.0:
                time.sleep(0.05)
            marks.append((megabytes(), process.num_fds(), threading.active_count()))
    took = time.perf_counter() - begin
    size = sum(path.stat().st_size for path in Path(settings.log_dir).rglob("journal-*.log"))
    first, last = marks[1], marks[-1]
    print(
        f"a writer, {SOAK_CALLS * SCALARS:,} scalars in {took:.0f} s, {size / SOAK_CALLS / SCALARS:.1f} B a scalar: "
        f"from the second tenth to the last memory {first[0]:.0f} -> {last[0]:.0f} MiB, "
        f"descriptors {first[1]} -> {last[1]}, threads {first[2]} -> {last[2]}"
    )


def main() -> None:
    away()
    soak()
    os._exit(0)  # there is nothing to close


if __name__ == "__main__":
    main()
