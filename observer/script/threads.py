"""Threads of ours that may be at work when the interpreter ends, after a ``finish()`` that had no more time.

Up to Python 3.13 that ends them wherever they are. Where one has just been started, or is in code of Rust (pydantic's)
or C++ (Ray's), the process dies of SIGABRT or SIGSEGV, after a training that went well.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref

PATIENCE_S = 2.0
"""How long the interpreter's end waits for them. What takes longer hangs in a call, where it is ended without harm."""

_begun: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_over = False


def start(thread: threading.Thread) -> None:
    """Start it. It has to end soon once there is no more time.

    Raises:
        RuntimeError: the interpreter is ending, or this process can have no more threads.
    """
    if _over:
        raise RuntimeError("the interpreter is ending")
    _begun.add(thread)
    thread.start()


@atexit.register
def _wait() -> None:
    global _over
    _over = True
    deadline = time.monotonic() + PATIENCE_S
    # One that is being ended may have just started another.
    while (alive := [thread for thread in list(_begun) if thread.is_alive()]) and time.monotonic() < deadline:
        alive[0].join(0.1)
