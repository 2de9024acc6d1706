"""How many ``log()`` calls a second reach one actor from four processes: ours, and one ``.remote(dict)`` per call.

Run it with: python -m tests.benchmarks.bench_ingest
Both run on the same cluster, one after the other, three times in turns; the last call of each process is acknowledged.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from typing import Any

PROCESSES = 4
NAIVE_CALLS = 2_000
OUR_CALLS = 200_000
ROUNDS = 3
DATA = {"loss": 0.5, "grad_norm": 1.5, "lr": 1e-4}


def main() -> None:
    os.environ.update(RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1")
    import ray

    context = ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, namespace="bench")
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    naive_rates, our_rates = [], []
    for number in range(ROUNDS):
        naive_rates.append(rate(naive, NAIVE_CALLS, number))
        our_rates.append(rate(ours, OUR_CALLS, number))
        # It would go on writing SwanLab for minutes, beside what is measured next.
        ray.kill(ray.get_actor(f"swanlab-writer:bench{number}", namespace="swanlab-ray"))
        print(f"round {number}: naive {naive_rates[-1]:9,.0f} calls/s, ours {our_rates[-1]:9,.0f} calls/s", flush=True)
    ratio = statistics.median(our_rates) / statistics.median(naive_rates)
    print(f"{PROCESSES} processes, {len(DATA)} scalars a call: {ratio:.0f} times the naive design")
    ray.shutdown()


def rate(worker: Any, calls: int, number: int) -> float:
    """``log()`` calls a second over all processes, from the common start to the last acknowledgement."""
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(PROCESSES), spawn.Queue()
    processes = [
        spawn.Process(target=worker, args=(rank, calls, number, barrier, results)) for rank in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    spans = [results.get() for _ in processes]
    for process in processes:
        process.join()
    took: float = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return PROCESSES * calls / took


def naive(rank: int, calls: int, number: int, barrier: Any, results: Any) -> None:
    """The design of the tutorials: the actor keeps each call in a list."""
    import ray

    ray.init(address=os.environ["RAY_ADDRESS"], namespace="bench", log_to_driver=False, logging_level="ERROR")

    class Naive:
        def __init__(self) -> None:
            self.rows: list[Any] = []

        def log(self, rank: int, step: int, data: dict[str, float]) -> int:
            self.rows.append((rank, step, data))
            return len(self.rows)

    actor = ray.remote(Naive).options(name=f"naive{number}", get_if_exists=True, num_cpus=0).remote()
    ray.get(actor.log.remote(rank, 0, DATA))
    barrier.wait()
    begin = time.time()
    for step in range(calls):
        last = actor.log.remote(rank, step, dict(DATA))
    ray.get(last)
    results.put((begin, time.time()))
    barrier.wait()  # the creator's exit would end the actor


def ours(rank: int, calls: int, number: int, barrier: Any, results: Any) -> None:
    """``Observer.log`` in bursts that fit the bounded deque; the trainer of a real job is far slower."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(PROCESSES), LOCAL_RANK=str(rank))
    from swanlab_ray.observer import connect

    observer = connect(
        project="bench", mode="offline", log_dir=tempfile.mkdtemp(), run_id=f"bench{number}", rank_series=0
    )
    assert observer.wait_ready(60)
    barrier.wait()
    begin = time.time()
    for step in range(calls):
        observer.log(DATA, step)
        if step % 10_000 == 9_999:
            while observer.statistics().waiting > 50_000:
                time.sleep(0.001)
    assert observer.flush(120)
    results.put((begin, time.time()))
    assert not observer.statistics().dropped
    results.close()
    results.join_thread()
    os._exit(0)  # what SwanLab then does with it is not measured here


if __name__ == "__main__":
    main()
