"""What the transport needs of a connection to the writer, and how one breaks."""

from __future__ import annotations

from typing import Any, Protocol

from swanlab_ray.actors.wire.messages import Ack, Declined, Farewell, Goodbye, Hello, NumberedBatch, Sign
from swanlab_ray.actors.wire.status import WriterStatus

CALL_DEADLINE_S = 30.0
"""How long an answer of the writer is waited for before the connection counts as broken."""


class LinkBroken(ConnectionError):
    """The writer cannot be reached now; it may be again later."""


class RunOver(LinkBroken):
    """The run has ended; its writer takes nothing more."""


class Hopeless(LinkBroken):
    """This process cannot reach the writer, however long it tries."""


class NotNow(LinkBroken):
    """Ask again: another process reports as this rank, or another job under this run id, or the writer of a run that
    has ended is still there. The message is for the user; empty where there is nothing to tell yet."""


class Link(Protocol):
    """A connection to the writer. Every method may raise :class:`LinkBroken`; only the flusher calls them."""

    run_id: str | None
    """None until the ranks have agreed on it."""
    deadline: float
    """Until when (monotonic) a call may take; earlier once the training has ended."""

    def open(self, hello: Hello) -> Ack:
        """Say hello to this run's writer, creating it if this rank comes first."""

    def ingest(self, sign: Sign, batch: NumberedBatch | None) -> Any:
        """Send a sign of life, with a batch or without; returns what the answer is asked for with."""

    def acknowledged(self, reference: Any, wait: float) -> Ack | None:
        """The answer to :meth:`ingest` if it has arrived within ``wait`` seconds."""

    def goodbye(self, goodbye: Goodbye, wait: float) -> Farewell:
        """Say goodbye."""

    def status(self, wait: float) -> WriterStatus | None:
        """What the writer knows, if it says so within ``wait`` seconds."""

    def close(self, over: bool) -> None:
        """Leave, for good where the run is ``over``; else :meth:`open` may be called again."""


def welcomed(answer: Ack | Declined) -> Ack:
    """What the writer answered to a hello.

    Raises:
        NotNow: it was declined.
    """
    if isinstance(answer, Declined):
        raise NotNow(answer.sentence)
    return answer


def brief(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
