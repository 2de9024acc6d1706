"""The Ray of a process that has initialised it: a worker of Ray Train or Tune, Axolotl with ``use_ray``, a script that
calls ``ray.init`` before ``connect()``. Its rank reports through that, while it lasts.

What the script does with it, it does when no call of ours is under way: Ray's core does not bear that.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from swanlab_ray.observer.ray_cluster import patches
from swanlab_ray.observer.ray_cluster.link import Connection, Taken

TURN_S = 5.0
"""How long the observer waits until the script's own call is over."""
SCRIPTS_TURN_S = 30.0
"""How long the script waits for a call of the observer. Most take a tenth of a second."""

_turn = threading.RLock()
_thread = threading.local()
_waiting = 0  # calls of the script that wait for their turn
_connections = 0  # counts what Ray was connected to
_shared = False
_forked_with_ray = False


def connection(ranks: int) -> Connection | None:
    """This process's connection to Ray, if it has one that all ranks of the job may share."""
    ray: Any = sys.modules.get("ray")
    initialised = getattr(ray, "is_initialized", None)  # it may be half imported
    client = sys.modules.get("ray.util.client")
    if _forked_with_ray or initialised is None or (client is not None and client.ray.is_connected()):
        return None  # Ray Client passes each call through one process of the cluster
    _share(ray)
    with using(None):
        if not initialised() or (ranks > 1 and patches.is_inside_alone()):
            return None  # each rank with a cluster of its own would have a writer of its own
        return Connection(ray.get_runtime_context().gcs_address, using=partial(using, _connections))


@contextmanager
def using(number: int | None) -> Iterator[None]:
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
        if number is not None and number != _connections:
            raise Taken("the script has left Ray")
        yield
    finally:
        _thread.depth -= 1
        _turn.release()


def _share(ray: Any) -> None:
    """Let the script's calls come first from now on. These names are public, and all of Ray asks by them."""
    global _shared
    if _shared:
        return
    _shared = True
    ray.init, ray.shutdown = _in_turn(ray.init), _in_turn(ray.shutdown)


def _in_turn(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def scripts(*args: Any, **kwargs: Any) -> Any:
        global _waiting, _connections
        _waiting += 1
        try:
            taken = _turn.acquire(timeout=SCRIPTS_TURN_S)  # else a call of ours hangs; Ray says what it thinks of that
        finally:
            _waiting -= 1
        try:
            _connections += 1
            return call(*args, **kwargs)
        finally:
            if taken:
                _turn.release()

    return scripts


def _is_observer() -> bool:
    return getattr(_thread, "depth", 0) > 0


def _after_fork() -> None:
    """The turn may be that of a thread that the child does not have, and Ray does not work in a fork."""
    global _turn, _waiting, _forked_with_ray
    _turn, _waiting = threading.RLock(), 0
    initialised = getattr(sys.modules.get("ray"), "is_initialized", None)  # it may be half imported
    _forked_with_ray = _forked_with_ray or (initialised is not None and bool(initialised()))


os.register_at_fork(after_in_child=_after_fork)
