"""The connection to a writer over Ray: of the agent of a machine, and of a process that has a Ray of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.messages import Ack, Declined, Farewell, Goodbye, Hello, NumberedBatch, RunEnded, Sign
from swanlab_ray.actors.wire.status import WriterStatus
from swanlab_ray.observer.ray_cluster.addresses import NoCluster, answers
from swanlab_ray.observer.transport.link import CALL_DEADLINE_S, Hopeless, LinkBroken, NotNow, RunOver, brief, welcomed

TURN_S = 0.1
"""How long the script's own use of Ray may have to wait for one look at an answer."""
STARTS = 3
"""How often a writer that cannot be started is tried."""
DYING_S = 10.0
"""How long the name of a run's writer may lead to one that has just ended."""
REFERENCE_BYTES = 4 << 20
"""A larger batch is sent as an object reference. Below that a value is faster, and it needs no raylet: a process would
die with the one of its node while it puts an object."""


class Taken(ConnectionError):
    """Ray is another one than it was, or none."""


@dataclass(frozen=True, slots=True)
class Connection:
    """This process's connection to a Ray cluster."""

    address: str
    life_lock: str | None = None
    """The lock file of a cluster that was started for this run: while somebody holds it, it lives."""
    using: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around whatever is done with Ray; raises :class:`Taken`."""


class RayLink:
    """Finds or creates the writer, and talks to it.

    Every method but the constructor may raise :class:`LinkBroken`.

    Args:
        settings: of the run.
        run_id: of the run.
        connect: connects to Ray, or says how this process is connected; raises ``NoCluster``.
    """

    def __init__(self, settings: ObserverSettings, run_id: str, connect: Callable[[], Connection]) -> None:
        self._settings = settings
        self._connect = connect
        self._connection: Connection | None = None
        self._writer: Any = None
        self._hopeless: str | None = None
        self._welcomed = False
        self._failures = 0  # in a row, of a writer that cannot be started
        self._died_at: float | None = None
        self.run_id: str | None = run_id
        self._run_id = run_id
        self.deadline = math.inf
        """Until when (monotonic) a call may take; earlier once the training has ended."""

    def open(self, hello: Hello) -> Ack:
        """Say hello to this run's writer, creating it if this rank comes first."""
        if self._hopeless is not None:
            raise Hopeless(self._hopeless)
        try:
            return self._open(hello)
        except LinkBroken:
            raise
        except Exception as error:  # Ray raises many kinds; each means the same here
            raise _broken(error) from error

    def _open(self, hello: Hello) -> Ack:
        connection = self._connection = self._connection or self._connect()
        if not answers(connection.address):  # Ray's own calls would wait for it without end
            raise LinkBroken(f"The Ray cluster at '{connection.address}' does not answer.")
        with self._ray() as ray:
            from swanlab_ray.actors.writer.handle import get_or_create

            if not ray.is_initialized():
                raise Taken("Ray was shut down")
            self._writer = get_or_create(self._run_id, self._settings, connection.life_lock)
        # Just after a run's end the name still finds the dying actor: only an answer proves that it lives.
        wait = max(0.5, min(CALL_DEADLINE_S, self.deadline - time.monotonic()))
        try:
            answer: Ack | Declined | None = self._answer(self._call("hello", hello), wait)
        except LinkBroken as error:
            self._note_failure(error)
            if self._is_ending(error):
                raise NotNow("") from error
            raise
        if answer is None:
            raise LinkBroken(f"The writer did not answer within {wait:.0f} s.")
        self._failures, self._died_at, self._welcomed = 0, None, True
        welcome = welcomed(answer)
        if self._settings.api_key is not None and self._settings.mode == "cloud":
            with suppress(LinkBroken):  # a writer of an older version does not ask for it
                self._call("take_key", self._settings.api_key, self._settings.api_host)
        return welcome

    def _is_ending(self, error: LinkBroken) -> bool:
        """Whether what answered was the writer of a run that has just ended, and could be started."""
        cause = error.__cause__
        if type(cause).__name__ != "ActorDiedError" or _cannot_start(cause):  # type: ignore[arg-type]
            return False
        now = time.monotonic()
        self._died_at = self._died_at or now
        return now - self._died_at < DYING_S

    def _note_failure(self, error: LinkBroken) -> None:
        """End a writer that its node cannot start: Ray would try for ever, also when this rank has gone."""
        why = self._why_not_started(error)
        if why is None:
            return
        self._failures += 1
        with suppress(Exception), self._ray() as ray:
            ray.kill(self._writer, no_restart=True)
        if self._failures >= STARTS:
            self._hopeless = why
        raise LinkBroken(why) from error

    def _why_not_started(self, error: LinkBroken) -> str | None:
        cause = error.__cause__
        if isinstance(cause, Exception) and _cannot_start(cause):
            return str(error)
        if self._welcomed or type(cause).__name__ != "ActorUnavailableError":
            return None
        from swanlab_ray.actors.writer.handle import import_there

        try:
            with self._ray():
                imported = import_there()
            self._answer(imported, min(CALL_DEADLINE_S, self.deadline - time.monotonic()))
        except LinkBroken as told:
            return str(told) if isinstance(told.__cause__, Exception) and _cannot_start(told.__cause__) else None
        except Exception:  # the cluster has ended meanwhile
            return None
        return None

    @contextmanager
    def _ray(self) -> Iterator[Any]:
        """Ray, connected as it was when this link was opened."""
        if self._connection is None:
            raise LinkBroken("not connected")
        import ray

        try:
            with self._connection.using():
                yield ray
        except Taken as error:
            self._connection = self._writer = None
            raise LinkBroken(f"{error}; joining again") from error

    def ingest(self, sign: Sign, batch: NumberedBatch | None) -> Any:
        """Send a sign of life, with a batch or without; the returned reference is the answer."""
        return self._call("ingest", sign, self._by_reference(batch))

    def acknowledged(self, reference: Any, wait: float) -> Ack | None:
        """The answer to :meth:`ingest` if it has arrived within ``wait`` seconds."""
        return self._answer(reference, wait)  # type: ignore[no-any-return]

    def goodbye(self, goodbye: Goodbye, wait: float) -> Farewell:
        """Say goodbye."""
        farewell: Farewell | None = self._answer(self._call("goodbye", goodbye), wait)
        if farewell is None:
            raise LinkBroken(f"the writer did not answer within {wait:.0f} s")
        return farewell

    def status(self, wait: float) -> WriterStatus | None:
        """What the writer knows, if it says so within ``wait`` seconds."""
        return self._answer(self._call("status"), wait)  # type: ignore[no-any-return]

    def tell_gone(self, rank: int, life: str) -> None:
        """Tell the writer that a rank's process has ended."""
        self._call("gone", rank, life)

    def close(self, over: bool) -> None:
        """Forget the writer; Ray itself belongs to somebody else."""
        self._connection = self._writer = None

    def _by_reference(self, batch: NumberedBatch | None) -> Any:
        """A large batch goes through the object store, a smaller one with the call."""
        if batch is None or len(batch.data) <= REFERENCE_BYTES:
            return batch
        try:
            with self._ray() as ray:
                return ray.put(batch)
        except LinkBroken:
            raise
        except Exception as error:
            raise _broken(error) from error

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._writer is None:
            raise LinkBroken("not connected")
        try:
            with self._ray() as ray:
                if not ray.is_initialized():
                    raise Taken("Ray was shut down")
                return getattr(self._writer, method).remote(*arguments)
        except LinkBroken:
            raise
        except Exception as error:
            raise _broken(error) from error

    def _ready(self, reference: Any, wait: float) -> bool:
        """Whether there is an answer. The script comes in between, should it want to initialise Ray itself."""
        deadline = time.monotonic() + wait
        try:
            while True:
                left = max(0.0, deadline - time.monotonic())
                with self._ray() as ray:
                    if ray.wait([reference], timeout=min(left, TURN_S))[0]:
                        return True
                if left <= TURN_S:
                    return False
        except LinkBroken:
            raise
        except Exception as error:
            raise _broken(error) from error

    def _answer(self, reference: Any, wait: float) -> Any:
        if not self._ready(reference, wait):
            return None
        try:
            with self._ray() as ray:
                return ray.get(reference)
        except LinkBroken:
            raise
        except Exception as error:
            raise _broken(error) from error


def _broken(error: Exception) -> LinkBroken:
    """What an exception means here. Ray raises that of the writer as its own kind, with the cause."""
    if isinstance(error, NoCluster):
        return LinkBroken(str(error))
    cause = getattr(error, "cause", None)
    told = cause if isinstance(cause, Exception) else error
    if isinstance(told, RunEnded):
        return RunOver(brief(told))
    if _cannot_start(error):
        return LinkBroken(
            "The cluster's head, where the writer runs, has no swanlab-ray, or another version of it: install it there "
            "as it is here."
        )
    return LinkBroken(brief(told))


def _cannot_start(error: Exception) -> bool:
    """Whether the writer's class could not even be imported, where Ray has started its process."""
    return "swanlab_ray" in str(error) and ("ModuleNotFoundError" in str(error) or "ImportError" in str(error))
