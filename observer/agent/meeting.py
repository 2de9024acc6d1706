"""How the machines of a job find each other where nobody has started a Ray cluster: rank 0 tells, through a store that
the ranks have already, where the agent of its machine listens."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from swanlab_ray.observer.agent.reach import Head, answers
from swanlab_ray.observer.job.identity import Identity, shared_store
from swanlab_ray.observer.ray_cluster.addresses import names_no_cluster
from swanlab_ray.observer.ray_cluster.finding import running_address
from swanlab_ray.observer.script.notices import warn_once
from swanlab_ray.observer.transport.link import LinkBroken

POLL_S = 0.5
TOLD_S = 30.0
"""After which a rank says what it waits for."""
WAIT_S = 300.0
"""How long rank 0's machine is waited for before that is told; then it is waited for again."""

_heads = msgspec.json.Decoder(Head)


class Meeting:
    """Of one rank with the others. No store is kept: one of torch.distributed has to end with its process group.

    Args:
        identity: of the rank.
        run_id: of the run.
    """

    def __init__(self, identity: Identity, run_id: str) -> None:
        self._identity = identity
        self._key = f"swanlab-ray/{run_id}/head"
        self._mine: Head | None = None
        self._told: Head | None = None
        self._over = threading.Event()
        self._telling: threading.Thread | None = None

    @property
    def may_start(self) -> bool:
        """Whether the agent of this machine may start a cluster: of all machines one does."""
        return self._identity.nodes == 1 or self._identity.node == 0

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
        if self._identity.node == 0:
            return self._head_here(reach)
        given = os.environ.get("RAY_ADDRESS")
        return None if given and names_no_cluster(given) is None else self._head_told(deadline)

    def close(self) -> None:
        """Tell nobody any more."""
        self._over.set()

    def _head_here(self, reach: Callable[[], Head]) -> Head | None:
        """None: it is this machine's; else rank 0 was on another machine before, where the run lies."""
        try:
            mine = reach()
        except LinkBroken as error:
            warn_once("unreachable here", f"Other machines of this job cannot report: {error}.")
            mine = Head([], "", str(error))
        told = self._read()
        if told is not None and told.token != mine.token and answers(told):
            return told
        if self._identity.rank == 0:
            self._mine = mine
            if not self._tell() and self._telling is None:
                # The training may initialise torch.distributed later, or never.
                self._telling = threading.Thread(target=self._tell_later, name="swanlab-ray-head", daemon=True)
                self._telling.start()
        return None

    def _tell_later(self) -> None:
        while not self._over.wait(POLL_S) and not self._tell():
            pass

    def _tell(self) -> bool:
        try:
            store = shared_store()
            if store is not None:
                store.set(self._key, msgspec.json.encode(self._mine).decode())
            return store is not None
        except Exception:  # it has ended, or cannot be reached
            return False

    def _read(self) -> Head | None:
        """What rank 0 has told last; what was told before where the store is gone."""
        try:
            store: Any = shared_store()
            if store is not None and store.check([self._key]):
                self._told = _heads.decode(store.get(self._key))
        except Exception:  # as above
            pass
        return self._told

    def _head_told(self, deadline: Callable[[], float]) -> Head | None:
        began = time.monotonic()
        while (told := self._read()) is None:
            if shared_store() is None and running_address() is not None:
                return None  # as each machine of a cluster has noted
            waited = time.monotonic() - began
            if waited >= WAIT_S or time.monotonic() >= deadline():
                raise LinkBroken(self._missing())
            if waited >= TOLD_S:
                warn_once("rank 0 has not told", f"{self._missing()} What this rank logs is kept meanwhile.")
            time.sleep(POLL_S)
        return told

    def _missing(self) -> str:
        told = f"The job runs on {self._identity.nodes} machines, and rank 0 has not told where to report"
        if shared_store() is not None:
            return f"{told}: it has not called connect() yet."
        return (
            f"{told}: call torch.distributed.init_process_group(), or set RAY_ADDRESS=HEAD:6379 of a Ray cluster on "
            "each."
        )
