"""The two ways on from an agent: to the writer, over Ray; and to the agent of rank 0's machine."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from swanlab_ray.actors.wire.messages import Farewell, Goodbye
from swanlab_ray.observer.agent import reach
from swanlab_ray.observer.agent.frames import SECRETS, Frame, Ingest, Opening, Stream, decoded, encoded
from swanlab_ray.observer.agent.starting import UNSTARTED
from swanlab_ray.observer.transport.link import CALL_DEADLINE_S, Link, LinkBroken

ANSWER_S = 1.0
"""How long one look for an answer takes."""


class Unstarted(Exception):
    """Ray could not be started, and this process ends."""


class WriterLink(Link, Protocol):
    """A rank's connection to its writer."""

    def tell_gone(self, rank: int, life: str) -> None:
        """Tell the writer that a rank's process has ended."""


class ToWriter:
    """Over Ray.

    Args:
        link: of the rank to the writer; to open it may raise :class:`Unstarted` as well.
        opening: the rank's first call.
        stream: takes the answers.
        welcomed: told that the writer has welcomed it.
        needed: whether other machines report through this one.
    """

    def __init__(
        self,
        link: WriterLink,
        opening: Opening,
        stream: Stream,
        welcomed: Callable[[], None] = lambda: None,
        needed: Callable[[], bool] = lambda: False,
    ) -> None:
        self._welcomed = welcomed
        self._needed = needed
        self._link = link
        self._opening = opening
        self._stream = stream
        self._left = False
        self._over = False
        self._asked: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._answer_batches, name="answers", daemon=True).start()

    def hear(self, frame: Frame) -> None:
        try:
            if frame.what == "open":
                welcome = self._link.open(self._opening.hello)
                self._welcomed()
                self._answer(frame.number, welcome)
            elif frame.what == "ingest":
                said = decoded(frame.body, Ingest)
                self._asked.put((frame.number, self._link.ingest(said.sign, said.batch)))
            elif frame.what == "goodbye":
                self._answer(frame.number, self._farewell(decoded(frame.body, Goodbye)))
                self._left = True
            elif frame.what == "status":
                self._answer(frame.number, self._link.status(CALL_DEADLINE_S))
        except Unstarted as error:
            self._stream.send(encoded(frame.number, UNSTARTED, str(error)))

    def _farewell(self, goodbye: Goodbye) -> Farewell:
        """Rank 0 waits for the end of the run where its launcher would end this machine before the others are done."""
        farewell = self._link.goodbye(goodbye, CALL_DEADLINE_S)
        waits = goodbye.rank == 0 and goodbye.state == "success" and self._needed()
        return Farewell(farewell.last or waits, farewell.notices, farewell.told)

    def tell_gone(self) -> None:
        if not self._left:
            self._link.tell_gone(self._opening.hello.rank, self._opening.hello.life)

    def close(self) -> None:
        self._over = True
        self._asked.put(None)

    def _answer_batches(self) -> None:
        """In their order, each when the writer has answered it."""
        while (asked := self._asked.get()) is not None:
            number, reference = asked
            with suppress(OSError):
                try:
                    while not self._over:
                        answer = self._link.acknowledged(reference, ANSWER_S)
                        if answer is not None:
                            self._answer(number, answer)
                            break
                except Exception as error:
                    self._stream.send(encoded(number, type(error).__name__, str(error)))

    def _answer(self, number: int, answer: Any) -> None:
        self._stream.send(encoded(number, "", answer))


class ToHead:
    """To the agent of rank 0's machine, which does with it as with a rank of its own.

    Args:
        head: where that listens.
        opening: the rank's first call.
        stream: takes the answers.

    Raises:
        OSError: it cannot be reached.
    """

    def __init__(self, head: reach.Head, opening: Opening, stream: Stream) -> None:
        self._opening = opening
        self._stream = stream
        self._head = Stream(reach.connect(head), CALL_DEADLINE_S)
        self._goodbye: int | None = None
        self._left = False
        threading.Thread(target=self._pass_back, name="answers", daemon=True).start()

    def hear(self, frame: Frame) -> None:
        if frame.what == "open":
            self._opening.head = None  # it is there
            for name in SECRETS:  # what is said to another machine is not encrypted; that one has its own
                self._opening.settings.pop(name, None)
            self._head.send(encoded(frame.number, "open", self._opening))
            return
        if frame.what == "goodbye":
            self._goodbye = frame.number
        self._head.pass_on(frame)

    def tell_gone(self) -> None:
        if not self._left:
            self._head.send(encoded(0, "gone", None))

    def close(self) -> None:
        self._head.close()

    def _pass_back(self) -> None:
        """What is answered there. Where that ends, so does the rank's connection, and it comes again."""
        with suppress(OSError, EOFError):
            while True:
                frame = self._head.receive(ANSWER_S)
                if frame is None:
                    continue
                if frame.number == self._goodbye and not frame.what:
                    self._left = True
                if frame.what == UNSTARTED:  # not the agent of this machine
                    why = f"Ray could not be started on rank 0's machine: {decoded(frame.body, str)}"
                    self._stream.send(encoded(frame.number, LinkBroken.__name__, why))
                else:
                    self._stream.pass_on(frame)
        self._stream.shut()
