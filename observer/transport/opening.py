"""Opening the connection to the writer, on a thread of its own: a cluster may have to be started, which takes minutes,
and what is logged meanwhile must go somewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from swanlab_ray.actors.wire.messages import Ack


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
        threading.Thread(target=self._work, name="swanlab-ray-connect", daemon=True).start()

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
