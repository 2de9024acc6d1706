"""A process has one connection to Ray. The observer's gives way to the script's, whenever that wants one.

While the observer is connected to a cluster of its own, the script sees a Ray that is not initialised:
``ray.is_initialized()`` is false, ``ray.init()`` and whatever initialises Ray by itself first take the observer's
connection away, and ``ray.shutdown()`` does nothing. The observer then reports to the script's Ray.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from swanlab_ray.observer.ray_cluster.guards import process_unchanged

TURN_S = 5.0
"""How long the observer waits until the script's own call is over."""
SCRIPTS_TURN_S = 30.0
"""How long the script waits for a call of the observer. Most take a tenth of a second."""


class Taken(ConnectionError):
    """Ray is the script's now, or another one than it was."""


_turn = threading.RLock()
_thread = threading.local()
_waiting = 0  # calls of the script that wait for their turn
_ours = False
_connection = 0  # counts what Ray was connected to
_forked_with_ray = False
_shutdown: Callable[..., Any] | None = None  # Ray's
_level: int | None = None  # of Ray's logger, before we changed it


@contextmanager
def using_ray(connection: int | None = None) -> Iterator[None]:
    """Around whatever the observer does with Ray, given which connection it was made for.

    Raises:
        Taken: that is not there any more.
    """
    deadline = time.monotonic() + TURN_S
    while _waiting and not _is_observer():
        if time.monotonic() >= deadline:
            break
        time.sleep(0.005)
    if not _turn.acquire(timeout=max(0.0, deadline - time.monotonic())):
        raise Taken("the script initialises Ray itself")
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        if connection is not None and connection != _connection:
            raise Taken("the script uses Ray itself")
        yield
    finally:
        _thread.depth -= 1
        _turn.release()


def claim(ours: bool) -> int:
    """Note a connection that the observer uses, and whether the script is not to see it. Returns its number."""
    global _ours, _connection
    _ours, _connection = ours, _connection + 1
    return _connection


def leave(always: bool = False) -> None:
    """Close the observer's connection; ``always`` where who asks knows that it is there, shared or not."""
    global _ours, _connection
    if _forked_with_ray or not (_ours or always):
        return  # in a fork it is the parent's, and Ray would wait for threads that only that has
    _ours, _connection = False, _connection + 1
    import ray

    with process_unchanged():
        (_shutdown or ray.shutdown)()
    speak()


def hush() -> None:
    """Silence Ray's logger while the connection is the observer's: Ray warns that it could not take over SIGTERM, as it
    should not, and prints what befalls the writer."""
    global _level
    logger = logging.getLogger("ray")
    _level = logger.level if _level is None else _level
    logger.setLevel(logging.CRITICAL)


def speak() -> None:
    """Give Ray's logger back to the script."""
    global _level
    if _level is not None:
        logging.getLogger("ray").setLevel(_level)
    _level = None


def is_under_way(ray: Any) -> bool:
    """Whether another thread is in ``ray.init``, which it may have entered before :func:`share`."""
    code = inspect.unwrap(ray.init).__code__
    for ident, frame in sys._current_frames().items():
        at: Any = frame if ident != threading.get_ident() else None
        while at is not None:
            if at.f_code is code:
                return True
            at = at.f_back
    return False


def share(ray: Any) -> None:
    """Let the script's calls come first from now on. These names are public, and all of Ray asks by them."""
    global _shutdown
    if _shutdown is not None:
        return
    init, is_initialized, _shutdown = ray.init, ray.is_initialized, ray.shutdown
    shutdown = _shutdown

    @functools.wraps(init)
    def scripts_init(*args: Any, **kwargs: Any) -> Any:
        if _is_observer():
            return init(*args, **kwargs)
        with _scripts_turn():
            return init(*args, **kwargs)

    @functools.wraps(is_initialized)
    def scripts_is_initialized() -> bool:
        return bool(is_initialized()) and (not _ours or _is_observer())

    @functools.wraps(shutdown)
    def scripts_shutdown(*args: Any, **kwargs: Any) -> Any:
        global _connection
        if _is_observer():
            return shutdown(*args, **kwargs)
        if _ours:
            return None  # the script has nothing to shut down
        with _scripts_turn():
            _connection += 1
            return shutdown(*args, **kwargs)

    ray.init, ray.is_initialized, ray.shutdown = scripts_init, scripts_is_initialized, scripts_shutdown


@contextmanager
def _scripts_turn() -> Iterator[None]:
    global _waiting
    _waiting += 1
    try:
        taken = _turn.acquire(timeout=SCRIPTS_TURN_S)  # else a call of ours hangs; Ray says what it thinks of that
    finally:
        _waiting -= 1
    try:
        if taken:
            leave()
        yield
    finally:
        if taken:
            _turn.release()


def _is_observer() -> bool:
    return getattr(_thread, "depth", 0) > 0


def _after_fork() -> None:
    """The turn may be that of a thread that the child does not have; the connection is the parent's, and the child's
    script sees of it what the parent's did."""
    global _turn, _waiting, _forked_with_ray
    _turn, _waiting = threading.RLock(), 0
    initialised = getattr(sys.modules.get("ray"), "is_initialized", None)  # it may be half imported
    _forked_with_ray = _forked_with_ray or _connection > 0 or (initialised is not None and initialised())


def forked_with_ray() -> bool:
    """Whether this is a fork of a process in which Ray was initialised, once at least: its core cannot be made anew
    here, and the one that there was has none of its threads."""
    return _forked_with_ray


os.register_at_fork(after_in_child=_after_fork)
