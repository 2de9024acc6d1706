"""What the agent does for the ranks of its machine: it passes on what they say to the writer, and what that answers.

It owns nothing: what is not acknowledged its rank sends again, through another agent if need be.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.messages import Goodbye, Hello
from swanlab_ray.observer.agent.frames import Frame, Ingest, Opening, Stream, decoded, encoded
from swanlab_ray.observer.agent.starting import UNSTARTED
from swanlab_ray.observer.transport.link import CALL_DEADLINE_S, Link, LinkBroken

ANSWER_S = 1.0
"""How long one look for an answer of the writer takes."""
EXIT_S = 1.0
"""How long a process is waited for that has closed its connection, to tell one that ends from one that only leaves."""
PEER = struct.Struct("3i")
"""``struct ucred``: process, user, group."""


class Unstarted(Exception):
    """Ray could not be started, and this process ends."""


class WriterLink(Link, Protocol):
    """A rank's connection to its writer."""

    def tell_gone(self, rank: int, life: str) -> None:
        """Tell the writer that a rank's process has ended."""


MakeLink = Callable[[ObserverSettings, str], WriterLink]
"""Makes one, given the settings of a run and its id. To open it may raise :class:`Unstarted` as well."""


def serve(path: Path, make_link: MakeLink) -> socket.socket:
    """Listen there, and hold a conversation with each rank, on threads of their own. Returns what it listens with."""
    links: dict[str, WriterLink] = {}  # by the life of a rank, which may come back over another socket

    def link_for(opening: Opening) -> WriterLink:
        return links.setdefault(opening.hello.life, make_link(ObserverSettings(**opening.settings), opening.run_id))

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen(128)

    def work() -> None:
        while True:
            try:
                connected, _ = listening.accept()
            except OSError:  # no more descriptors, or closed
                if listening.fileno() < 0:
                    return
                time.sleep(ANSWER_S)
                continue
            pid, user, _ = PEER.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
            if user == os.getuid():
                threading.Thread(target=Conversation(connected, pid, link_for).run, name="rank", daemon=True).start()
            else:
                connected.close()

    threading.Thread(target=work, name="listening", daemon=True).start()
    return listening


class Conversation:
    """With one process of the training."""

    def __init__(self, connected: socket.socket, pid: int, link_for: Callable[[Opening], WriterLink]) -> None:
        self._stream = Stream(connected, CALL_DEADLINE_S)
        self._process = Exit(pid)
        self._link_for = link_for
        self._link: WriterLink | None = None
        self._hello: Hello | None = None
        self._left = False
        self._over = threading.Event()
        self._asked: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()

    def run(self) -> None:
        """Until the other side has gone."""
        answering = threading.Thread(target=self._answer_batches, name="answers", daemon=True)
        answering.start()
        try:
            while (frame := self._next()) is not None:
                self._hear(frame)
        except (OSError, EOFError):
            pass
        finally:
            self._over.set()
            self._asked.put(None)
            answering.join()
            self._stream.close()
            if not self._left and self._process.ended_within(EXIT_S):
                self._tell_gone()
            self._process.close()

    def _tell_gone(self) -> None:
        if self._link is not None and self._hello is not None:
            with suppress(LinkBroken):
                self._link.tell_gone(self._hello.rank, self._hello.life)

    def _next(self) -> Frame | None:
        """What the rank says next; None once its process has ended, whose forks may hold the socket still."""
        while True:
            over = self._process.is_over()
            frame = self._stream.receive(0.0)
            if frame is not None or over:
                return frame
            self._process.wait(self._stream.socket)

    def _hear(self, frame: Frame) -> None:
        try:
            if frame.what == "open":
                self._answer(frame.number, self._open(decoded(frame.body, Opening)))
                return
            if self._link is None:
                raise LinkBroken("not connected")
            if frame.what == "ingest":
                said = decoded(frame.body, Ingest)
                self._asked.put((frame.number, self._link.ingest(said.sign, said.batch)))
            elif frame.what == "goodbye":
                self._answer(frame.number, self._link.goodbye(decoded(frame.body, Goodbye), CALL_DEADLINE_S))
                self._left = True
            elif frame.what == "status":
                self._answer(frame.number, self._link.status(CALL_DEADLINE_S))
        except Exception as error:
            self._fail(frame.number, error)

    def _open(self, opening: Opening) -> Any:
        self._link = self._link_for(opening)
        self._hello, self._left = opening.hello, False
        return self._link.open(opening.hello)

    def _answer_batches(self) -> None:
        """In their order, each when the writer has answered it."""
        while (asked := self._asked.get()) is not None:
            number, reference = asked
            try:
                while not self._over.is_set():
                    assert self._link is not None
                    answer = self._link.acknowledged(reference, ANSWER_S)
                    if answer is not None:
                        self._answer(number, answer)
                        break
            except Exception as error:
                with suppress(OSError):
                    self._fail(number, error)

    def _answer(self, number: int, answer: Any) -> None:
        self._stream.send(encoded(number, "", answer))

    def _fail(self, number: int, error: Exception) -> None:
        kind = UNSTARTED if isinstance(error, Unstarted) else type(error).__name__
        self._stream.send(encoded(number, kind, str(error)))


class Exit:
    """Whether a process has ended; where it is in another container nobody knows before its connection is closed."""

    def __init__(self, pid: int) -> None:
        self._descriptor: int | None = None
        self._poll = select.poll()
        with suppress(OSError):
            self._descriptor = os.pidfd_open(pid)
            self._poll.register(self._descriptor, select.POLLIN)

    def is_over(self) -> bool:
        """Whether it is known to have ended."""
        return self.ended_within(0.0)

    def ended_within(self, seconds: float) -> bool:
        """Its connection is closed a little before it has ended."""
        return self._descriptor is not None and bool(self._poll.poll(seconds * 1000))

    def wait(self, connected: socket.socket) -> None:
        """Until it has ended, or something has come over its connection."""
        both = select.poll()
        both.register(connected, select.POLLIN)
        if self._descriptor is not None:
            both.register(self._descriptor, select.POLLIN)
        both.poll()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
