"""What capturing completions costs the training thread, and what a hundred thousand rows cost the writer.

The time is measured inside the capture, not as a difference of two trainings: a step of these tiny models takes less
than the noise between two of them. Run it with: python -m tests.benchmarks.bench_completions
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from typing import Any

import psutil

from swanlab_ray.actors.journal.records import Arrived, Batch
from swanlab_ray.actors.reduction.reduction import Reduction
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.codec import encode_batch
from swanlab_ray.actors.wire.events import COMPLETIONS
from swanlab_ray.observer.completions import attach
from swanlab_ray.observer.encoding.numbers import Deferred, encode
from tests import rlhf

STEPS = 40
WARM_UP = 5
ROWS = 100_000
BUDGET = 0.005
"""Of the time of a step, at the most."""


class Sent:
    """An observer that keeps what it is sent."""

    rank, world_size = 0, 1
    settings = ObserverSettings(project="bench", completion_log_interval=1)

    def __init__(self) -> None:
        self.tokenizers: set[str] = set()
        self.events: list[bytes | Deferred] = []

    def send(self, event: bytes | Deferred) -> None:
        self.events.append(event)


def capture(algorithm: str) -> tuple[float, float, float]:
    """Microseconds of the training thread per capture, milliseconds of a step, bytes of an event."""
    from transformers import TrainerCallback

    sent: Any = Sent()
    marks: list[tuple[float, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert watched is not None
            marks.append((time.perf_counter(), watched.nanoseconds))

    trainer = rlhf.trainer(algorithm, tempfile.mkdtemp(), [Clock()], hidden=256, max_steps=STEPS)
    watched = attach(trainer, sent)
    trainer.train()
    (begin, before), (end, after) = marks[WARM_UP - 1], marks[-1]
    sizes = [len(event.encode()) for event in sent.events if isinstance(event, Deferred)]
    steps = STEPS - WARM_UP
    return (after - before) / steps / 1e3, (end - begin) / steps * 1e3, sum(sizes) / len(sizes)


class Tables:
    """Counts the rows of tables."""

    rows = 0

    def write(self, step: int, time_ns: int, values: dict[str, float], table: Any = None) -> None:
        self.rows += len(table.rows) if table is not None else 0

    def config(self, values: dict[str, Any]) -> None: ...


def memory() -> None:
    """A writer that takes rows of 2 KiB, 32 a step, with a table every ten steps."""
    tables = Tables()
    reduction = Reduction(tables, ObserverSettings(project="bench", completion_log_interval=10))
    reduction.take(Arrived(rank=0, world_size=1, life="l", local_rank=0, host="h", pid=1, pid_namespace="n"))
    process, used = psutil.Process(), []
    steps = ROWS // 32
    for step in range(steps):
        columns = {"prompt": [f"{step} {'p' * 1000}"] * 32, "completion": [f"{step} {'c' * 1000}"] * 32}
        event = encode((COMPLETIONS, step, step * 10**9, "grpo", "", 0, columns))
        reduction.take(Batch(0, "l", step, step * 10**9, 1, encode_batch([event])))
        if step in (steps // 10, steps - 1):
            used.append(process.memory_info().rss / 2**20)
    dropped = reduction.completions.dropped
    print(
        f"a writer, {ROWS:,} rows: memory {used[0]:.0f} MiB after a tenth, {used[1]:.0f} MiB at the end; "
        f"{tables.rows:,} in tables, {dropped:,} more than the bound"
    )


def main() -> None:
    logging.disable(logging.INFO)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(f"time of the training thread (limit {BUDGET:.1%} of a step)")
    print(f"{'':6} {'per capture':>12} {'this step':>10} {'event':>9}   of 200 ms, interval 1   of 20 ms, interval 10")
    for algorithm in rlhf.ALGORITHMS:
        microseconds, step, size = capture(algorithm)
        share = microseconds / 200e3, microseconds / (10 * 20e3)
        print(
            f"{algorithm:6} {microseconds:9.0f} us {step:7.1f} ms {size:7.0f} B {share[0]:23.2%} {share[1]:24.2%}",
            flush=True,
        )
    memory()


if __name__ == "__main__":
    main()
