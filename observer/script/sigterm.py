"""SIGTERM: how torchrun, Slurm and Kubernetes tell a process to end. The run should know, and have its last values.

Python runs a signal's handler on the main thread between two bytecodes, and so not while that waits in a collective.
But it writes a byte to its wakeup descriptor at once: a thread of ours reads it, tells the writer, and then lets the
signal do what it would have done.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from swanlab_ray.observer.script.notices import logger

TOLD_S = 5.0
"""How long the process lives on at the most, to tell the writer; launchers wait 30 s before they send SIGKILL."""


class TerminationWatch:
    """Calls ``on_sigterm()`` on a thread of its own, then ends the process by SIGTERM.

    Does nothing where somebody handles SIGTERM, now or by then, or where this is not the main thread.
    """

    def __init__(self, on_sigterm: Callable[[], object]) -> None:
        self._on_sigterm = on_sigterm
        self._ending = False
        self._over = False
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        if threading.current_thread() is not threading.main_thread():
            return
        for earlier in [watch for watch in _active if watch._over]:  # of a run that another thread has finished
            earlier.stop()
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return
        try:
            self._begin()
        except (OSError, RuntimeError) as error:  # no more descriptors, or threads
            self.stop()
            logger.warning("SIGTERM will not be told to the writer (%s); the training goes on.", error)

    def _begin(self) -> None:
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        if before != -1:  # an event loop's
            signal.set_wakeup_fd(before)
            reader.close()
            writer.close()
            return
        self._sockets = reader, writer
        signal.signal(signal.SIGTERM, self._handler)
        _active.append(self)
        threading.Thread(target=self._watch, args=(reader,), name="swanlab-ray-sigterm", daemon=True).start()

    def stop(self) -> None:
        """Leave SIGTERM to itself."""
        self._over = True
        if self._sockets is None or self._ending or threading.current_thread() is not threading.main_thread():
            return  # another thread can change nothing: what ends the process stays until the next run
        reader, writer = self._sockets
        if signal.getsignal(signal.SIGTERM) == self._handler:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        current = signal.set_wakeup_fd(-1)
        if current not in (-1, writer.fileno()):
            with suppress(OSError, ValueError):  # it was closed
                signal.set_wakeup_fd(current)
        self._sockets = None
        _active.remove(self)
        reader.close()
        writer.close()

    def wait(self) -> None:
        """Where SIGTERM is being handled, wait to be ended by it."""
        if self._ending:
            time.sleep(TOLD_S)

    def _handler(self, number: int, frame: FrameType | None) -> None:
        """Python writes the byte only for signals that have a handler. It is written again, should the descriptor be
        somebody else's by now."""
        if self._sockets is not None:
            with suppress(OSError):
                self._sockets[1].send(bytes([number]))

    def _watch(self, reader: socket.socket) -> None:
        while True:
            try:
                received = reader.recv(64)
            except OSError:
                return
            if not received:
                return
            if signal.SIGTERM in received and signal.getsignal(signal.SIGTERM) == self._handler:
                break
        self._ending = True
        telling = threading.Thread(target=self._on_sigterm, name="swanlab-ray-last-words", daemon=True)
        telling.start()
        telling.join(TOLD_S)
        # signal.signal() works on the main thread only.
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(int(signal.SIGTERM), None)  # SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.0)
        os._exit(128 + signal.SIGTERM)  # process 1 of a container is not ended by a signal of its own


_active: list[TerminationWatch] = []
_forking = threading.local()


def _before_fork() -> None:
    """A child must not wake the parent's thread, so SIGTERM waits until the child is set right."""
    if _active:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork() -> None:
    mask = getattr(_forking, "mask", None)
    if mask is not None:
        _forking.mask = None
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    for watch in list(_active):
        watch.stop()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
