"""How the machines of a job find each other where nobody has started a Ray cluster: rank 0 tells, through a store that
the ranks have already, where the agent of its machine listens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from swanlab_ray.observer.agent.reach import Head, answers
from swanlab_ray.observer.job.identity import Identity, shared_store
from swanlab_ray.observer.ray_cluster.finding import running_address
from swanlab_ray.observer.transport.link import LinkBroken

POLL_S = 0.5
WAIT_S = 300.0
"""How long rank 0's machine is waited for before it is told; then it is waited for again."""


class Meeting:
    """Of one rank with the others.

    Args:
        identity: of the rank.
        run_id: of the run.
    """

    def __init__(self, identity: Identity, run_id: str) -> None:
        self._identity = identity
        self._key = f"swanlab-ray/{run_id}/head"
        self._store: Any = None

    def head(self, reach: Callable[[], Head], deadline: Callable[[], float]) -> Head | None:
        """Where this rank's agent has to pass on what it hears; None: it speaks to Ray itself.

        Args:
            reach: asks the agent of this machine where it can be reached.
            deadline: says until when (monotonic) it may take.

        Raises:
            LinkBroken: that was not to be found out.
        """
        if self._identity.nodes == 1:
            return None
        if self._identity.node != 0:
            return None if running_address() is not None else self._told(deadline)
        # Only rank 0 is waited for by others, and so waits for a store that may come.
        store = self._found_store(deadline if self._identity.rank == 0 else lambda: 0.0)
        if store is None:
            return None
        mine = reach()
        if store.check([self._key]):
            told = self._read(store)
            if told.token != mine.token and answers(told):
                return told  # rank 0 was on another machine before, where the run lies
        if self._identity.rank == 0:
            store.set(self._key, msgspec.json.encode(mine).decode())
        return None

    def _read(self, store: Any) -> Head:
        return msgspec.json.decode(store.get(self._key), type=Head)

    def _found_store(self, deadline: Callable[[], float]) -> Any:
        """The training may initialise torch.distributed later. Where a cluster is meant that is not waited for."""
        self._store = self._store or shared_store()
        while self._store is None and time.monotonic() < deadline() and running_address() is None:
            time.sleep(POLL_S)
            self._store = shared_store()
        return self._store

    def _told(self, deadline: Callable[[], float]) -> Head:
        until = time.monotonic() + WAIT_S
        store = self._found_store(lambda: min(until, deadline()))
        if store is None:
            raise LinkBroken(
                f"The job runs on {self._identity.nodes} machines, and its ranks share no store to find each other: "
                "call torch.distributed.init_process_group(), or set RAY_ADDRESS=HEAD:6379 of a Ray cluster on each."
            )
        while not store.check([self._key]):
            if time.monotonic() >= min(until, deadline()):
                raise LinkBroken("Rank 0 has not told yet where its machine's agent listens.")
            time.sleep(POLL_S)
        return self._read(store)
