"""What spans cost: one call, the spans of a step, and a writer with many ranks.

Run it with: python -m tests.benchmarks.bench_spans
The calls are measured in one process, in turns, so that a noisy machine is noisy for all of them.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, perf_counter_ns

from tests.benchmarks.bench_memory import Gone

ROUNDS = 30
CALLS = 1000
DRAIN_S = 0.05
"""Pause after each round, so that SwanLab's threads do not slow down whoever comes next."""
STEP_S = 0.05
SPANS_PER_STEP = 20
RANKS, STEPS_PER_SECOND, SECONDS = 64, 10, 30


class Worker:
    """What is decorated does nothing."""

    def work(self) -> None: ...


class Empty:
    """The least that a context manager in Python does."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def calls(directory: Path) -> None:
    """Microseconds a call, without those of the loop."""
    from swanlab_ray.observer import connect
    from swanlab_ray.observer.profiling import DEFAULT_PROFILING_CONFIG, swanlab_profile, swanlab_profiling_context
    from swanlab_ray.observer.timing import spans

    DEFAULT_PROFILING_CONFIG.min_duration_ms = 0.0  # else nothing this short is logged
    observer = connect(project="bench", mode="offline", log_dir=directory / "ours")
    assert observer.wait_ready(120)
    observer.step = 1  # as the callbacks do
    log = spans.active

    class Profiled:
        @swanlab_profile
        def work(self) -> None: ...

    worker, profiled, seed = Worker(), Profiled(), synchronous(directory)

    def nothing() -> None:
        worker.work()

    def bare() -> None:
        begin = perf_counter()
        worker.work()
        _ = perf_counter() - begin

    def empty() -> None:
        with Empty("work"):
            worker.work()

    def span() -> None:
        with observer.span("work"):
            worker.work()

    def context() -> None:
        with swanlab_profiling_context(worker, "work"):
            worker.work()

    def no_span() -> None:
        with spans.span("work"):
            worker.work()

    candidates: dict[str, tuple[Callable[[], None], bool]] = {
        "bare perf_counter pair": (bare, True),
        "empty context manager": (empty, True),
        "@swanlab_profile": (profiled.work, True),
        "span": (span, True),
        "swanlab_profiling_context": (context, True),
        "@swanlab_profile, not connected": (profiled.work, False),
        "span, not connected": (no_span, False),
        "swanlab.log for each call": (seed, True),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, (call, connected) in candidates.items():
            spans.active = log if connected else None
            times[name].append(block(call))
        time.sleep(DRAIN_S)
    spans.active = log
    # A decorated method takes the place of the method itself; the others have a frame around it here.
    direct, within = (statistics.median(block(call) for _ in range(ROUNDS)) for call in (worker.work, nothing))
    medians = {
        name: statistics.median(found) - (direct if name.startswith("@") else within) for name, found in times.items()
    }
    for name, median in medians.items():
        print(f"{name:32} {median:7.2f} us, {median / medians['bare perf_counter pair']:6.1f} x bare")
    ratio = medians["swanlab.log for each call"] / medians["@swanlab_profile"]
    print(f"@swanlab_profile is {ratio:.0f} times cheaper than swanlab.log for each call")


def block(call: Callable[[], None]) -> float:
    for _ in range(CALLS // 10):
        call()
    begin = perf_counter_ns()
    for _ in range(CALLS):
        call()
    return (perf_counter_ns() - begin) / CALLS / 1e3


def synchronous(directory: Path) -> Callable[[], None]:
    """The seed's design: every call ends with ``swanlab.log``."""
    import swanlab

    settings = swanlab.Settings(mode="offline", log_dir=directory / "swanlab", interactive=False)
    run = swanlab.init(project="bench", settings=settings)
    worker = Worker()

    def call() -> None:
        begin = perf_counter()
        worker.work()
        run.log({"profiling/Time taken: Worker.work": perf_counter() - begin})

    return call


def step_of_spans() -> None:
    """The time inside of twenty spans around the small operations of a step of 50 ms; and of as many bare timers.

    The rank's flusher is at work; its cluster, which on this machine would share the cores, is not there.
    """
    import torch

    from swanlab_ray.actors.settings import ObserverSettings
    from swanlab_ray.observer.job.identity import Identity
    from swanlab_ray.observer.observer import Observer

    settings = ObserverSettings(project="bench", mode="offline", log_dir=tempfile.mkdtemp(), run_id="bench")
    observer = Observer(settings, Identity(0, 1, 0, 1), Gone())  # type: ignore[arg-type]

    tensor = torch.randn(16, 16)

    def work() -> None:
        end = perf_counter() + STEP_S / SPANS_PER_STEP
        while perf_counter() < end:
            (tensor @ tensor).relu().sum()

    def spans() -> float:
        begin = perf_counter()
        with observer.span("work"):
            entered = perf_counter()
            work()
            left = perf_counter()
        return perf_counter() - left + entered - begin

    def bare() -> float:
        begin = perf_counter()
        start = perf_counter()
        entered = perf_counter()
        work()
        left = perf_counter()
        _ = perf_counter() - start
        return perf_counter() - left + entered - begin

    def empty() -> float:
        begin = perf_counter()
        with Empty("work"):
            entered = perf_counter()
            work()
            left = perf_counter()
        return perf_counter() - left + entered - begin

    took: dict[Callable[[], float], list[float]] = {spans: [], empty: [], bare: []}
    for step in range(60):
        observer.step = step
        for measured, times in took.items():
            times += [measured() for _ in range(SPANS_PER_STEP)]
    # Of the median, since this process is put aside now and then for longer than a span takes.
    median, least, floor = (SPANS_PER_STEP * statistics.median(took[kind]) for kind in (spans, empty, bare))
    print(
        f"{SPANS_PER_STEP} spans in a step of 50 ms: {median * 1e6:.0f} us, {median / STEP_S:.3%} of it; "
        f"as many empty context managers {least * 1e6:.0f} us, bare perf_counter pairs {floor * 1e6:.0f} us"
    )


def many_ranks() -> None:
    """A writer that gets the spans of 64 ranks, as fast as it takes them."""
    from swanlab_ray.actors.delivery.sink import Row, Sink
    from swanlab_ray.actors.settings import ObserverSettings
    from swanlab_ray.actors.wire.codec import encode_batch
    from swanlab_ray.actors.wire.events import Spans
    from swanlab_ray.actors.wire.messages import Counts, Hello, NumberedBatch, Sign
    from swanlab_ray.actors.writer.actor import Writer
    from swanlab_ray.actors.writer.parts import Parts
    from swanlab_ray.observer.encoding.numbers import encode

    class Nowhere(Sink):
        def _write_some(self, first: Row) -> None:
            self.written += len(first.values)
            self._forget(1)

    Parts._make_sink = lambda self: Nowhere("offline", self.notices, self.notes.opened)  # type: ignore[method-assign]
    settings = ObserverSettings(project="bench", mode="offline", log_dir=tempfile.mkdtemp(), run_id="bench")
    writer = Writer("bench", settings)
    for rank in range(RANKS):
        writer.hello(
            Hello(
                rank=rank,
                world_size=RANKS,
                local_rank=0,
                host="h",
                pid=os.getpid(),
                pid_namespace="elsewhere",
                gpu=None,
                life=f"life{rank}",
                next_seq=0,
            )
        )
    names = [f"phase {number}" for number in range(SPANS_PER_STEP)]
    count = SPANS_PER_STEP * STEPS_PER_SECOND
    batches = []
    logged_ns = time.time_ns() - SECONDS * 10**9
    for second in range(SECONDS):
        event = Spans(
            time_ns=logged_ns + second * 10**9,
            begin_ns=logged_ns + second * 10**9,
            dropped=0,
            names=names,
            threads=["training"],
            thread=[0] * count,
            name=[number % SPANS_PER_STEP for number in range(count)],
            step=[second * STEPS_PER_SECOND + number // SPANS_PER_STEP for number in range(count)],
            begins=[number * 10**9 // count for number in range(count)],
            durations=[10**9 // count - 1000] * count,
            parents=[],
            gpu=[],
        )
        batches.append(encode_batch([encode(event)]))
    begin, cpu = perf_counter(), time.process_time()
    for second, batch in enumerate(batches):
        for rank in range(RANKS):
            sign = Sign(rank, f"life{rank}", Counts(logged=second))
            while writer.ingest(sign, NumberedBatch(second, 1, batch)).next_seq != second + 1:
                time.sleep(0.001)
    while writer.status().received < RANKS * SECONDS or writer._parts.decoding.behind() > 0 or writer.status().lag > 0:
        time.sleep(0.01)
    took, cpu = perf_counter() - begin, time.process_time() - cpu
    spans = RANKS * count * SECONDS
    print(
        f"a writer with {RANKS} ranks, {SPANS_PER_STEP} spans a step, {STEPS_PER_SECOND} steps a second: {SECONDS} s "
        f"of them ({spans:,} spans) in {took:.1f} s ({SECONDS / took:.1f} times as fast as they come), "
        f"{cpu / SECONDS:.2f} of a core"
    )


def main() -> None:
    os.environ.update(RAY_AUTH_MODE="disabled", HF_HUB_OFFLINE="1", OBSERVER_NODE_INTERVAL="0")
    step_of_spans()
    calls(Path(tempfile.mkdtemp()))
    many_ranks()
    os._exit(0)  # SwanLab's own exit handlers take long and are not measured


if __name__ == "__main__":
    main()
