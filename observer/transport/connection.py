"""The connection to the writer. It is opened on a thread of its own: a cluster may have to be started, which takes
minutes, and what is logged meanwhile must go somewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial

from swanlab_ray.actors.wire.messages import Ack, Farewell, Goodbye, Hello
from swanlab_ray.actors.wire.status import WriterStatus
from swanlab_ray.observer.script import threads
from swanlab_ray.observer.transport.link import CALL_DEADLINE_S, Link, LinkBroken

CLOSED_POLL_S = 0.05
"""Pause between two looks at whether the run is closed."""
OPENING_POLL_S = 0.01
"""Pause between two looks at the queue while the connection is being opened: nothing else empties it."""


class Connection:
    """Opens a link, as often as it breaks.

    Args:
        link: what is opened.
        hello: makes this rank's greeting, given the first batch it can still send. It may wait, for a GPU's driver.
        away: around what may take long, see :class:`swanlab_ray.observer.transport.last_words.Ownership`.
    """

    def __init__(
        self, link: Link, hello: Callable[[int], Hello], away: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._link = link
        self._hello = hello
        self._away = away
        self._opening: Opening | None = None
        self._greeting: Hello | None = None
        self._over = False
        self.up = False
        self.times = 0
        """How often it was opened."""

    def open(self, next_seq: int) -> Ack | None:
        """The writer's welcome; None: it is still being opened, and somebody has to look after the queue.

        Raises:
            LinkBroken: it could not be opened.
            RuntimeError: this process can have no more threads.
        """
        if self._opening is None:
            self._opening = Opening(partial(self._greet, next_seq), partial(self._link.close, False))
        with self._away():
            over = self._opening.wait(OPENING_POLL_S)
        if not over:
            return None
        opening, self._opening = self._opening, None
        welcome = opening.answer()
        self.up = True
        self.times += 1
        return welcome

    def _greet(self, next_seq: int) -> Ack:
        self._greeting = self._hello(next_seq)
        return self._link.open(self._greeting)

    def greeting(self) -> Hello | None:
        """The latest, or what it would be; None while another thread waits for it: so would this one."""
        return self._greeting or (self._hello(0) if self._opening is None else None)

    def goodbye(self, goodbye: Goodbye, deadline: float) -> Farewell:
        """Say goodbye, by ``deadline`` (monotonic)."""
        with self._away():
            return self._link.goodbye(goodbye, max(0.5, deadline - time.monotonic()))

    def wait_closed(self, deadline: float) -> WriterStatus | None:
        """Wait until the run is closed or until ``deadline`` (monotonic); returns the writer's last status, if it told
        one."""
        status = None
        with suppress(LinkBroken), self._away():  # everything is said; a restarted writer has no use for this rank
            while (left := deadline - time.monotonic()) > 0:
                status = self._link.status(max(0.1, min(CALL_DEADLINE_S, left)))
                self._over = status is not None and status.closed
                if status is None or status.closed:
                    return status
                time.sleep(CLOSED_POLL_S)
            return status
        return None

    def leave(self) -> None:
        """Close it, now or when it is open."""
        if self._opening is not None:
            self._opening.abandon()
        else:
            self._link.close(self._over)


class Opening:
    """A connection that is being opened.

    Args:
        open: opens it, and returns the writer's answer.
        close: closes it again, should nobody wait for it any more.

    Raises:
        RuntimeError: this process can have no more threads.
    """

    def __init__(self, open: Callable[[], Ack], close: Callable[[], None]) -> None:
        self._open = open
        self._close = close
        self._answer: Ack | None = None
        self._error: Exception | None = None
        self._abandoned = False
        self._changing = threading.Lock()
        self._done = threading.Event()
        threads.start(threading.Thread(target=self._work, name="swanlab-ray-connect", daemon=True))

    def wait(self, seconds: float) -> bool:
        """Whether it is over, at the latest after so many seconds."""
        return self._done.wait(seconds)

    def answer(self) -> Ack:
        """The writer's answer, once it is over; raises what opening has raised."""
        if self._answer is None:
            assert self._error is not None
            raise self._error
        return self._answer

    def abandon(self) -> None:
        """Nobody waits any more: the connection is closed, now or when it is open."""
        with self._changing:
            self._abandoned = True
            over = self._done.is_set()
        if over:
            self._close()

    def _work(self) -> None:
        try:
            self._answer = self._open()
        except BaseException as error:  # for whoever waits, whom a SystemExit would end
            self._error = error if isinstance(error, Exception) else RuntimeError(repr(error))
        with self._changing:
            self._done.set()
            abandoned = self._abandoned
        if abandoned:
            with suppress(Exception):
                self._close()
