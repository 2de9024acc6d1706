"""The connection of a rank to its writer over Ray. Only the flusher thread uses it."""

from __future__ import annotations

import time
from typing import Any

from swanlab_ray.actors.protocol import Ack, Beat, Declined, Farewell, Goodbye, Hello, WriterStatus
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.observer import cluster
from swanlab_ray.observer.identity import Identity, resolve_run_id

CALL_DEADLINE_S = 30.0
"""How long an answer of the writer is waited for before the connection counts as broken."""

DYING_S = 10.0
"""How long the name of a run's writer may lead to one that has just ended."""

REFERENCE_BYTES = 4 << 20
"""A larger batch is sent as an object reference. Below that a value is faster, and it needs no raylet: a rank would die
with the one of its node while it puts an object."""


class LinkBroken(ConnectionError):
    """The writer cannot be reached now; it may be again later."""


class RunOver(LinkBroken):
    """The run has ended; its writer takes nothing more."""


class NotNow(LinkBroken):
    """Ask again: another process reports as this rank, or another job under this run id, or the writer of a run that
    has ended is still there. The message is for the user; empty where there is nothing to tell yet."""


def welcomed(answer: Ack | Declined) -> Ack:
    """What the writer answered to a hello.

    Raises:
        NotNow: it was declined.
    """
    if isinstance(answer, Declined):
        raise NotNow(answer.sentence)
    return answer


class RayLink:
    """Finds or starts Ray, finds or creates the writer, and talks to it.

    Every method but the constructor may raise :class:`LinkBroken`.
    """

    def __init__(self, settings: ObserverSettings, identity: Identity) -> None:
        self._settings = settings
        self._identity = identity
        self._cluster: cluster.Cluster | None = None
        self._writer: Any = None
        self._died_at: float | None = None
        self.run_id: str | None = settings.run_id

    def open(self, hello: Hello) -> Ack:
        """Say hello to this run's writer, creating it if this rank comes first."""
        try:
            return self._open(hello)
        except cluster.NoCluster as error:
            raise LinkBroken(str(error)) from error
        except LinkBroken:
            raise
        except Exception as error:  # Ray raises many kinds; each means the same here
            raise (RunOver if "RunEnded" in str(error) else LinkBroken)(_brief(error)) from error

    def _open(self, hello: Hello) -> Ack:
        # Ray Train tells its run only after Ray is imported; otherwise the id is there before Ray is.
        if self.run_id is None:
            self.run_id = resolve_run_id(self._settings, self._identity)
        if self._cluster is None:
            self._cluster = cluster.attach(self.run_id, self._identity.nodes, self._settings.dashboard)
        import ray

        from swanlab_ray.actors.handle import get_or_create

        if not cluster.reachable(self._cluster):
            raise LinkBroken(f"The Ray cluster at '{self._cluster.address}' does not answer.")
        if not ray.is_initialized():
            self._cluster = None
            raise LinkBroken("Ray was shut down under the observer; joining again.")
        self._writer = get_or_create(self.run_id, self._settings, self._cluster.life_lock)
        # Just after a run's end the name still finds the dying actor: only an answer proves that it lives.
        try:
            answer = ray.get(self._writer.hello.remote(hello), timeout=CALL_DEADLINE_S)
        except ray.exceptions.ActorDiedError:
            now = time.monotonic()
            self._died_at = self._died_at or now
            if now - self._died_at < DYING_S:
                raise NotNow("") from None
            raise
        self._died_at = None
        return welcomed(answer)

    def ingest(self, rank: int, life: str, seq: int, events: int, batch: bytes) -> Any:
        """Send a batch of so many events; the returned reference is the answer."""
        return self._call("ingest", rank, life, seq, events, self._by_reference(batch))

    def acknowledged(self, reference: Any, wait: float) -> Ack | None:
        """The answer to a batch if it has arrived within ``wait`` seconds."""
        return self._answer(reference, wait)  # type: ignore[no-any-return]

    def beat(self, beat: Beat) -> Any:
        """Send a sign of life; the returned reference is the answer."""
        return self._call("beat", beat)

    def beaten(self, reference: Any) -> Ack | bool | None:
        """The answer to a sign of life if it has arrived; False where the writer does not know this rank."""
        ready = self._ready(reference, 0.0)
        return (self._answer(reference, 0.0) or False) if ready else None

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

    @staticmethod
    def _by_reference(batch: bytes) -> Any:
        """A large batch goes through the object store, a smaller one with the call."""
        if len(batch) <= REFERENCE_BYTES:
            return batch
        import ray

        try:
            return ray.put(batch)
        except Exception as error:
            raise LinkBroken(_brief(error)) from error

    def _call(self, method: str, *arguments: Any) -> Any:
        import ray

        if self._writer is None or not ray.is_initialized():
            raise LinkBroken("not connected")
        try:
            return getattr(self._writer, method).remote(*arguments)
        except Exception as error:
            raise LinkBroken(_brief(error)) from error

    def _ready(self, reference: Any, wait: float) -> bool:
        import ray

        try:
            return bool(ray.wait([reference], timeout=wait)[0])
        except Exception as error:
            raise LinkBroken(_brief(error)) from error

    def _answer(self, reference: Any, wait: float) -> Any:
        import ray

        if not self._ready(reference, wait):
            return None
        try:
            return ray.get(reference)
        except Exception as error:
            raise LinkBroken(_brief(error)) from error


def _brief(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (
        f"{type(error).__name__}: {lines[-1 if 'RunEnded' in str(error) else 0][:200]}"
        if lines
        else type(error).__name__
    )
