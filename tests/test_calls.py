"""The writer's calls over Ray: which of them may wait, and for whom nobody else waits meanwhile."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Launch, SharedCluster

SLOW_CALLS = """
    import os, sys, time
    from pathlib import Path
    import ray
    from swanlab_ray.actors.settings import ObserverSettings
    from swanlab_ray.actors.wire.messages import Counts, Goodbye, Hello, Sign
    from swanlab_ray.actors.writer.actor import Writer
    from swanlab_ray.actors.writer.handle import GROUPS

    here = Path.cwd()
    NOTHING = Counts()

    class SlowWriter(Writer):
        # As if its journal took long to read and to write, until there is a file of this test.

        def __init__(self, directory, *arguments):
            super().__init__(*arguments)
            self._waiting = directory
            self._parts.decoding.settled = self._wait
            self._parts.members.read_on = self._read_on

        def _read_on(self, hello):
            if hello.next_seq:
                self._wait(0)

        def _wait(self, seconds):
            (self._waiting / f"waits {time.monotonic_ns()}").touch()
            while not (self._waiting / "go on").exists():
                time.sleep(0.01)

    def hello(rank, next_seq=0):
        return Hello(rank=rank, world_size=5, local_rank=rank, host="h", pid=1, pid_namespace="elsewhere", gpu=None,
            life=f"life{rank}", next_seq=next_seq)

    def waiting(number):
        deadline = time.monotonic() + 120
        while len(list(here.glob("waits *"))) < number:
            assert time.monotonic() < deadline, "they do not wait together"
            time.sleep(0.01)

    ray.init(log_to_driver=False)
    settings = ObserverSettings(log_dir=here / "swanlog")
    writer = ray.remote(concurrency_groups=GROUPS)(SlowWriter).options(num_cpus=0).remote(here, "slow", settings)
    ray.get([writer.hello.remote(hello(rank)) for rank in range(4)])
    slow = [
        writer.goodbye.remote(Goodbye(rank=rank, life=f"life{rank}", state="success", error=None, ended_ns=1,
            counts=NOTHING))
        for rank in (1, 2, 3)
    ]
    slow.append(writer.hello.remote(hello(4, next_seq=7)))
    waiting(4)
    for _ in range(10):
        assert ray.get(writer.ingest.remote(Sign(0, "life0", NOTHING), None), timeout=60).next_seq == 0
    assert ray.wait(slow, num_returns=4, timeout=0)[0] == []
    (here / "go on").touch()
    ray.get(slow)
    print([rank.state for rank in ray.get(writer.status.remote()).ranks])
    ray.kill(writer)
"""


def test_no_sign_of_life_waits_behind_another_rank_s_hello_or_goodbye(
    in_cluster: SharedCluster, launch: Launch, tmp_path: Path
) -> None:
    """And the goodbyes of a world wait together."""
    done = launch(SLOW_CALLS, ranks=0, RAY_ADDRESS=in_cluster.address).wait()
    assert done.code == 0, done.output
    assert "['running', 'success', 'success', 'success', 'running']" in done.output
