"""Jobs on two machines without Ray, many times: how soon the first value is acknowledged, what it takes, what is left.

Run it as root with: python -m tests.benchmarks.bench_machines [ROUNDS]
The machines are network namespaces of this one; each has two ranks under torchrun.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
from pathlib import Path

import psutil

from tests.hosts import Hosts
from tests.test_hosts import Job

ROUNDS = 20
JOB = """
import time
from pathlib import Path
from swanlab_ray.observer import connect
observer = connect()
import torch.distributed as dist
dist.init_process_group("gloo")
first_step = time.monotonic()
observer.log({"loss": 1.0}, 0)
assert observer.flush(300)
print(f"acknowledged after {time.monotonic() - first_step:.2f} s", flush=True)
Path(__file__).with_name(f"ready{observer.rank}").touch()
while not Path(__file__).with_name("go").exists():
    time.sleep(0.01)
print("finished", observer.finish(), flush=True)
"""


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    hosts = Hosts(2)
    delays: list[float] = []
    ended = 0
    try:
        for number in range(rounds):
            job = Job(hosts, Path(tempfile.mkdtemp()), source=JOB)
            job.wait_reported()
            if number == 0:
                for host in range(2):
                    print(f"machine {host}: {memory(hosts, host)}", flush=True)
            job.go_on()
            job.wait_over()
            found = [float(seconds) for seconds in re.findall(r"acknowledged after ([\d.]+) s", job.said())]
            delays += found
            ended += job.said().count("finished True") == 4
            print(f"round {number}: acknowledged {max(found):.1f} s after the first step", flush=True)
    finally:
        hosts.end()
    print(
        f"{ended} of {rounds} jobs complete, and nothing left; the first value of a rank is acknowledged "
        f"{statistics.median(delays):.1f} s after its first step (median), {max(delays):.1f} s at the most"
    )


def memory(hosts: Hosts, number: int) -> str:
    """MiB of what runs beside the training, shared pages divided."""
    parts: dict[str, float] = {}
    for pid in hosts.processes(number):
        process = psutil.Process(pid)
        words = " ".join(process.cmdline())
        if "agent.process" in words:
            name = "agent"
        elif "gcs_server" in words or "raylet/raylet" in words or words.startswith("ray::"):
            name = words.split()[0].rpartition("/")[2]
        else:
            continue
        parts[name] = parts.get(name, 0.0) + process.memory_full_info().pss / 2**20
    told = ", ".join(f"{name} {size:.0f}" for name, size in parts.items())
    return f"{sum(parts.values()):.0f} MiB ({told})"


if __name__ == "__main__":
    main()
