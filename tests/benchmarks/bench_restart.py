"""How long a rank waits for its next acknowledgement after kill -9 of the writer, under real Ray.

Run it with: python -m tests.benchmarks.bench_restart
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from typing import Any

ROUNDS = 5
EVENTS = 100_000
"""In the journal before the first kill."""


def main() -> None:
    os.environ.update(RAY_AUTH_MODE="disabled", OBSERVER_NODE_INTERVAL="0")
    import ray

    from swanlab_ray.actors.wire.messages import ACTOR_PREFIX, NAMESPACE
    from swanlab_ray.observer import connect

    ray.init(
        address="local", include_dashboard=False, log_to_driver=False
    )  # the script's own, so that it sees the writer
    observer = connect(project="bench", mode="offline", log_dir=tempfile.mkdtemp())
    assert observer.wait_ready(120)
    step = 0
    for step in range(EVENTS):
        observer.log({"loss": 0.1 * step, "grad_norm": 1.0, "lr": 1e-4}, step)
        if step % 20_000 == 0:
            assert observer.flush(60)
    assert observer.flush(60)
    writer: Any = ray.get_actor(f"{ACTOR_PREFIX}{observer.run_id}", NAMESPACE)
    took = []
    for number in range(ROUNDS):
        os.kill(ray.get(writer.status.remote()).pid, signal.SIGKILL)
        begin = time.perf_counter()
        step += 1
        observer.log({"loss": 0.0}, step)
        assert observer.flush(120)
        took.append(time.perf_counter() - begin)
        print(f"kill {number}: a new event is acknowledged after {took[-1]:.1f} s", flush=True)
    print(
        f"kill -9 of the writer of {EVENTS:,} events: next acknowledgement after {statistics.median(took):.1f} s "
        f"(median), {max(took):.1f} s at the most"
    )
    observer.finish()


if __name__ == "__main__":
    main()
