"""What the agent does for the ranks of its machine: it listens, and passes on what they say and what is answered.

It owns nothing: what is not acknowledged its rank sends again, through another agent if need be.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec

from swanlab_ray.observer.agent import reach
from swanlab_ray.observer.agent.frames import Frame, Opening, Stream, decoded, encoded
from swanlab_ray.observer.transport.link import CALL_DEADLINE_S

AGAIN_S = 1.0
"""Pause where no connection can be taken, such as without descriptors."""
EXIT_S = 1.0
"""How long a process is waited for that has closed its connection, to tell one that ends from one that only leaves."""
PEER = struct.Struct("3i")
"""``struct ucred``: process, user, group."""


class Onward(Protocol):
    """The way on from here: to the writer over Ray, or to the agent of rank 0's machine."""

    def hear(self, frame: Frame) -> None:
        """Pass on a call; its answer goes to the stream whenever it comes."""

    def tell_gone(self) -> None:
        """The process of the rank has ended without a goodbye that was answered."""

    def close(self) -> None:
        """The rank has left."""


MakeOnward = Callable[[Opening, Stream, bool], Onward]
"""Makes one, given a rank's first call, the stream that takes the answers, and whether it is on another machine."""


class Server:
    """Holds a conversation with each rank, on threads of their own.

    Args:
        path: where it listens.
        make_onward: makes the way on for each.
    """

    def __init__(self, path: Path, make_onward: MakeOnward) -> None:
        self._make_onward = make_onward
        self._reaching = threading.Lock()
        self._head: reach.Head | None = None
        self._afar: list[socket.socket] = []
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(path))
        self.listening.listen(128)
        self._begin(self.listening, self._converse_here)

    def reachable(self) -> reach.Head:
        """Listen to the agents of other machines as well, from now on; returns where.

        Raises:
            OSError: no port is free.
        """
        with self._reaching:
            if self._head is None:
                listening, token = reach.listen()
                self._begin(listening, lambda one: self._converse_afar(one, token))
                self._head = reach.Head(reach.addresses(listening.getsockname()[1]), token)
            return self._head

    def needed(self) -> bool:
        """Whether another machine reports through this one now."""
        return bool(self._afar)

    def is_head(self, head: reach.Head) -> bool:
        """Whether that is where this process listens itself."""
        return self._head is not None and self._head.token == head.token

    def _begin(self, listening: socket.socket, converse: Callable[[socket.socket], None]) -> None:
        def work() -> None:
            while listening.fileno() >= 0:
                try:
                    one, _ = listening.accept()
                except OSError:  # no more descriptors, or closed
                    time.sleep(AGAIN_S)
                    continue
                try:
                    threading.Thread(target=converse, args=(one,), name="rank", daemon=True).start()
                except RuntimeError:  # no more threads
                    one.close()

        threading.Thread(target=work, name="listening", daemon=True).start()

    def _converse_here(self, one: socket.socket) -> None:
        pid, user, _ = PEER.unpack(one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
        if user != os.getuid():
            one.close()
            return
        Conversation(one, Exit(pid), self._make_onward, self.reachable).run()

    def _converse_afar(self, one: socket.socket, token: str) -> None:
        if reach.accepted(one, token):
            self._afar.append(one)
            try:
                Conversation(one, Exit(None), self._make_onward, self.reachable).run()
            finally:
                self._afar.remove(one)


class Conversation:
    """With one process of the training, or with the agent of its machine.

    Args:
        process: of the training, where it is on this machine.
        make_onward: makes the way on.
        reachable: lets other machines reach this one.
    """

    def __init__(
        self, one: socket.socket, process: Exit, make_onward: MakeOnward, reachable: Callable[[], reach.Head]
    ) -> None:
        self._stream = Stream(one, CALL_DEADLINE_S)
        self._process = process
        self._make_onward = make_onward
        self._reachable = reachable
        self._onward: Onward | None = None

    def run(self) -> None:
        """Until the other side has gone."""
        try:
            while (frame := self._next()) is not None:
                self._hear(frame)
        except (OSError, EOFError, msgspec.MsgspecError):
            pass
        self._stream.close()
        if self._onward is not None:
            with suppress(Exception):
                if self._process.ended_within(EXIT_S):
                    self._onward.tell_gone()
            self._onward.close()
        self._process.close()

    def _next(self) -> Frame | None:
        """What is said next; None once the process has ended, whose forks may hold the socket still."""
        while True:
            over = self._process.ended_within(0.0)
            frame = self._stream.receive(0.0)
            if frame is not None or over:
                return frame
            self._process.wait(self._stream.socket)

    def _hear(self, frame: Frame) -> None:
        try:
            if frame.what == "reach":
                self._stream.send(encoded(frame.number, "", self._reachable()))
                return
            if self._onward is None:
                self._onward = self._make_onward(decoded(frame.body, Opening), self._stream, self._process.afar)
            if frame.what == "gone":
                self._onward.tell_gone()
            else:
                self._onward.hear(frame)
        except Exception as error:
            self._stream.send(encoded(frame.number, type(error).__name__, str(error)))


class Exit:
    """The end of a process; where it is in another container nobody knows before its connection is closed.

    Args:
        pid: its id; None where it is on another machine.
    """

    def __init__(self, pid: int | None) -> None:
        self.afar = pid is None
        self._descriptor: int | None = None
        self._poll = select.poll()
        if pid:
            with suppress(OSError):
                self._descriptor = os.pidfd_open(pid)
                self._poll.register(self._descriptor, select.POLLIN)

    def ended_within(self, seconds: float) -> bool:
        """Whether it is known to have ended by then. Its connection is closed a little before."""
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
