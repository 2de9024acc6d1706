"""The connection of a rank to its writer over Ray. Only the flusher thread uses it."""

from __future__ import annotations

import time
from typing import Any

from swanlab_ray.actors.protocol import Ack, Beat, Farewell, Goodbye, Hello, Welcome, WriterStatus
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.observer import cluster
from swanlab_ray.observer.identity import Identity, resolve_run_id

CALL_DEADLINE_S = 30.0
"""How long an answer of the writer is waited for before the connection counts as broken."""


class LinkBroken(ConnectionError):
    """The writer cannot be reached now; it may be again later."""


class RayLink:
    """Finds or starts Ray, finds or creates the writer, and talks to it.

    Every method but the constructor may raise :class:`LinkBroken`.
    """

    def __init__(self, settings: ObserverSettings, identity: Identity) -> None:
        self._settings = settings
        self._identity = identity
        self._cluster: cluster.Cluster | None = None
        self._writer: Any = None
        self.run_id: str | None = settings.run_id

    def open(self, hello: Hello) -> Welcome:
        """Say hello to this run's writer, creating it if this rank comes first."""
        try:
            return self._open(hello)
        except cluster.NoCluster as error:
            raise LinkBroken(str(error)) from error
        except Exception as error:  # Ray raises many kinds; each means the same here
            raise LinkBroken(_brief(error)) from error

    def _open(self, hello: Hello) -> Welcome:
        # Ray Train tells its run only after Ray is imported; otherwise the id is there before Ray is.
        if self.run_id is None:
            self.run_id = resolve_run_id(self._settings, self._identity)
        if self._cluster is None:
            self._cluster = cluster.attach(self.run_id, self._identity.nodes)
        import ray

        from swanlab_ray.actors.writer import get_or_create

        if not cluster.reachable(self._cluster):
            raise LinkBroken(f"The Ray cluster at '{self._cluster.address}' does not answer.")
        if not ray.is_initialized():
            self._cluster = None
            raise LinkBroken("Ray was shut down under the observer; joining again.")
        self._writer = get_or_create(self.run_id, self._settings, self._cluster.life_lock)
        # Just after a run's end the name still finds the dying actor: only an answer proves that it lives.
        welcome: Welcome = ray.get(self._writer.hello.remote(hello), timeout=CALL_DEADLINE_S)
        return welcome

    def ingest(self, rank: int, life: str, seq: int, batch: bytes) -> Any:
        """Send a batch; the returned reference is its acknowledgement."""
        return self._call("ingest", rank, life, seq, batch)

    def acknowledged(self, reference: Any, wait: float) -> Ack | None:
        """The acknowledgement if it has arrived within ``wait`` seconds."""
        return self._answer(reference, wait)  # type: ignore[no-any-return]

    def beat(self, beat: Beat) -> Any:
        """Send a sign of life; the returned reference answers whether the writer knows this rank."""
        return self._call("beat", beat)

    def beaten(self, reference: Any) -> bool | None:
        """The answer to a sign of life if it has arrived."""
        return self._answer(reference, 0.0)  # type: ignore[no-any-return]

    def goodbye(self, goodbye: Goodbye, wait: float) -> Farewell:
        """Say goodbye."""
        farewell: Farewell | None = self._answer(self._call("goodbye", goodbye), wait)
        if farewell is None:
            raise LinkBroken(f"the writer did not answer within {wait:.0f} s")
        return farewell

    def wait_closed(self, deadline: float) -> WriterStatus | None:
        """Wait until the run is closed or until ``deadline`` (monotonic); returns the last status that was read."""
        status = None
        while time.monotonic() < deadline:
            status = self._answer(self._call("status"), max(0.1, deadline - time.monotonic()))
            if status is None or status.closed:
                break
            time.sleep(0.05)
        return status

    def close(self) -> None:
        """Leave the cluster."""
        if self._cluster is not None:
            cluster.detach(self._cluster)
            self._cluster = None

    def _call(self, method: str, *arguments: Any) -> Any:
        import ray

        if self._writer is None or not ray.is_initialized():
            raise LinkBroken("not connected")
        try:
            return getattr(self._writer, method).remote(*arguments)
        except Exception as error:
            raise LinkBroken(_brief(error)) from error

    def _answer(self, reference: Any, wait: float) -> Any:
        import ray

        try:
            ready, _ = ray.wait([reference], timeout=wait)
            return ray.get(ready[0]) if ready else None
        except Exception as error:
            raise LinkBroken(_brief(error)) from error


def _brief(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (
        f"{type(error).__name__}: {lines[-1 if 'RunEnded' in str(error) else 0][:200]}"
        if lines
        else type(error).__name__
    )
