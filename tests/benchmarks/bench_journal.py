"""How fast the journal is: from ``log()`` calls to acknowledged on disk, beside Trackio; and back again after a kill.

Run it with: python -m tests.benchmarks.bench_journal
One process, 10 scalars a call, in turns: a rank's channel and a writer without Ray between them; the same without
syncing to disk; Trackio's own log() and finish(). Then the journal is read by a new incarnation of the writer.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CALLS = 100_000
SCALARS = 10
ROUNDS = 3
RECOVERED = 1_000_000
TRACKIO = """
import os, sys, time, random
os.environ["TRACKIO_DIR"] = sys.argv[1]
import trackio
run = trackio.init(project="bench", embed=False)
rows = [{f"metric_{n}": random.gauss(0, 1) for n in range(10)} for _ in range(1000)]
begin = time.perf_counter()
for step in range(int(sys.argv[2])):
    run.log(rows[step % 1000], step=step)
trackio.finish()
print("seconds", time.perf_counter() - begin)
"""


class Direct:
    """A link to a writer in this process."""

    run_id: str | None = "bench"
    deadline = 0.0

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def open(self, hello: Any) -> Any:
        return self.writer.hello(hello)

    def ingest(self, sign: Any, batch: Any) -> Any:
        return self.writer.ingest(sign, batch)

    def acknowledged(self, reference: Any, wait: float) -> Any:
        return reference

    def goodbye(self, goodbye: Any, wait: float) -> Any:
        return self.writer.goodbye(goodbye)

    def status(self, wait: float) -> None: ...

    def close(self, over: bool) -> None: ...


def ours(sync: bool) -> tuple[float, float]:
    """Scalars a second to the last acknowledgement, and bytes a scalar."""
    from swanlab_ray.actors.journal.files import Disk
    from swanlab_ray.actors.settings import ObserverSettings
    from swanlab_ray.actors.writer.actor import Writer
    from swanlab_ray.actors.writer.parts import Parts
    from swanlab_ray.observer.job.identity import Identity
    from swanlab_ray.observer.observer import Observer
    from tests.incarnations import NoSwanLab

    # The journal is measured; a process has one SwanLab client, which the first round would keep.
    Parts._make_sink = lambda self: NoSwanLab(self.notices, self.notes.opened)  # type: ignore[method-assign]
    log_dir = Path(tempfile.mkdtemp())
    settings = ObserverSettings(project="bench", mode="offline", log_dir=log_dir, run_id="bench")
    if not sync:
        Disk.sync, real = (lambda self, descriptor: None), Disk.sync  # type: ignore[method-assign]
    writer = Writer("bench", settings)
    writer._parts.decoding._forward = lambda decoded: None
    observer = Observer(settings, Identity(0, 1, 0, 1), Direct(writer))
    rows = [{f"metric_{n}": random.gauss(0, 1) for n in range(SCALARS)} for _ in range(CALLS)]
    assert observer.wait_ready(10)
    begin = time.perf_counter()
    for step in range(CALLS):
        observer.log(rows[step], step)
        while len(observer._queue) > 50_000:  # it is bounded: beyond 65,536 the oldest would be dropped
            time.sleep(0.001)
    assert observer.flush(60)
    took = time.perf_counter() - begin
    assert not observer.statistics().dropped
    size = sum(path.stat().st_size for path in log_dir.rglob("journal-*.log"))
    observer.finish(timeout=10)
    if not sync:
        Disk.sync = real  # type: ignore[method-assign]
    return CALLS * SCALARS / took, size / (CALLS * SCALARS)


def trackio() -> tuple[float, float]:
    directory = tempfile.mkdtemp()
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, directory, str(CALLS)], capture_output=True, text=True, check=True
    )
    took = float(done.stdout.split("seconds")[1])
    size = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
    return CALLS * SCALARS / took, size / (CALLS * SCALARS)


class Counting:
    """Counts the rows that a reduction writes."""

    rows = 0

    def write(self, step: int, time_ns: int, values: dict[str, float], table: Any = None) -> None:
        self.rows += 1

    def config(self, values: dict[str, Any]) -> None: ...


def recovery() -> None:
    """A new writer on a journal of a million events: until it answers, and until SwanLab would have all of it."""
    from swanlab_ray.actors.journal.files import run_directory
    from swanlab_ray.actors.journal.reading import Damaged
    from swanlab_ray.actors.journal.records import Arrived, Batch, Header
    from swanlab_ray.actors.journal.writing import Journal
    from swanlab_ray.actors.reduction.reduction import Reduction
    from swanlab_ray.actors.runs.finding import find_runs
    from swanlab_ray.actors.runs.merging import merged
    from swanlab_ray.actors.runs.summary import summarise
    from swanlab_ray.actors.settings import ObserverSettings
    from swanlab_ray.actors.wire.codec import encode_batch
    from swanlab_ray.actors.wire.events import SCALARS as SCALARS_TAG
    from swanlab_ray.actors.wire.events import USER
    from swanlab_ray.observer.encoding.numbers import encode

    directory = run_directory(Path(tempfile.mkdtemp()), "bench")
    journal = Journal(
        directory,
        lambda epoch: Header(kind="journal", run_id="bench", epoch=epoch, host="h", pid=1, settings={}),
        lambda error: None,
        lambda: None,
    )
    journal.start(lambda committed: None)
    for rank in range(4):
        journal.append(
            Arrived(rank=rank, world_size=4, life=f"life{rank}", local_rank=rank, host="h", pid=1, pid_namespace="n")
        )
    values = [{"loss": random.random(), "grad_norm": random.random(), "lr": 1e-4} for _ in range(1000)]
    per_batch = 1000
    for seq in range(RECOVERED // 4 // per_batch):
        steps = range(seq * per_batch, (seq + 1) * per_batch)
        for rank in range(4):
            events = [encode((SCALARS_TAG, step, step * 10**6, USER, values[step % 1000])) for step in steps]
            journal.append(Batch(rank, f"life{rank}", seq, time.time_ns(), per_batch, encode_batch(events)))
    journal.close(60)
    begin = time.perf_counter()
    (run,) = find_runs([directory])
    summary = summarise(run.paths)
    until_ack = time.perf_counter() - begin
    output = Counting()
    begin = time.perf_counter()
    reduction = Reduction(output, ObserverSettings(project="bench"))
    for entry in merged(run):
        if not isinstance(entry, Damaged):
            reduction.take(entry)
    reduction.flush()
    rebuilt = time.perf_counter() - begin
    print(
        f"recovery of {summary.events:,} events ({summary.size / 2**20:.0f} MiB): first answer after "
        f"{until_ack:.2f} s, all of it reduced to {output.rows:,} rows after {rebuilt:.1f} s"
    )


def main() -> None:
    os.environ["SWANLAB_LOG_LEVEL"] = "error"
    rates: dict[str, list[tuple[float, float]]] = {"synced": [], "not synced": [], "Trackio": []}
    for number in range(ROUNDS):
        rates["synced"].append(ours(sync=True))
        rates["not synced"].append(ours(sync=False))
        rates["Trackio"].append(trackio())
        print(f"round {number}:", {name: f"{found[-1][0]:,.0f}/s" for name, found in rates.items()}, flush=True)
    for name, found in rates.items():
        print(
            f"{name:12} {statistics.median(rate for rate, _ in found):12,.0f} scalars/s, {found[-1][1]:5.1f} B a scalar"
        )
    recovery()
    os._exit(0)  # the writers of this process have nothing to close


if __name__ == "__main__":
    main()
