"""Keeps Ray from harming the process it is loaded into. Each guard names what it prevents."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from typing import Any

from swanlab_ray.observer.ray_cluster.addresses import socket_answers
from swanlab_ray.observer.script.notices import logger

_ENVIRONMENT = {
    # The C++ core exits a driver 60 s after the GCS is gone; a training must outlive its observer.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "1000000",
    # Batches travel inside the call, not through the object store: with a dead raylet that would exit the process.
    "RAY_max_direct_call_object_size": str(4 << 20),
    "RAY_task_rpc_inlined_bytes_limit": str(64 << 20),
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_DEDUP_LOGS": "0",
}

# Ray's core installs a failure handler for these that aborts the process 3 s after SIGTERM.
_SIGNALS = (signal.SIGTERM, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGINT)


def set_environment() -> None:
    """Set what Ray reads when it is imported; what the user has set stays."""
    if "ray" in sys.modules and not _is_ray_worker() and not _ENVIRONMENT.keys() <= os.environ.keys():
        logger.info(
            "Ray was imported before connect(), so a lost GCS may end this process after 60 s: import "
            "swanlab_ray.observer.session first, or export RAY_gcs_rpc_server_reconnect_timeout_s=1000000."
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def occupy_standard_descriptors() -> None:
    """Where standard input, output or error are closed, Ray's sockets would get their numbers, and all that anybody
    prints would go into them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _is_ray_worker() -> bool:
    """Whether Ray has started this process, so that it ends with its node's raylet whatever is set."""
    core = sys.modules.get("ray._private.worker")
    try:
        return core is not None and bool(core.global_worker.mode == core.WORKER_MODE)
    except AttributeError:  # another thread is importing it
        return False


@contextmanager
def process_unchanged() -> Iterator[None]:
    """Put signal handlers, ``sys.excepthook`` and faulthandler back to what they were before the block.

    Handlers are saved and restored with sigaction(2), since Python's ``signal`` works on the main thread only and this
    runs on the flusher's. What the training itself changes meanwhile stays changed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    saved = {}
    for number in _SIGNALS:
        action = ctypes.create_string_buffer(256)  # more than struct sigaction on any platform
        if libc.sigaction(int(number), None, action) == 0:
            saved[number] = (action, signal.getsignal(number))
    hook, dumps = sys.excepthook, faulthandler.is_enabled()
    try:
        yield
    finally:
        if not dumps:
            faulthandler.disable()  # whoever asks whether it is on must not be told so, since its handlers go now
        for number, (action, handler) in saved.items():
            if signal.getsignal(number) is handler:
                libc.sigaction(int(number), action, None)
        if sys.excepthook.__module__.startswith("ray."):
            sys.excepthook = hook


UV_HOOK = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
LOCAL_NODE_S = 20.0
"""How long a node of the cluster is looked for on this machine; Ray's own 60 s are most of what ``finish()`` has."""


class RayletGone(ConnectionError):
    """The node of this machine does not listen."""


@contextmanager
def joining() -> Iterator[None]:
    """Around the observer's ``ray.init``, which Ray would turn into more than a connection, or into the process's end.

    Below ``uv run`` it would pack the working directory and start the writer through uv; its hook is a constant of
    Ray's. And where the raylet of this machine does not listen (it was killed, or its socket was cleaned away) Ray's
    core ends the process with code 1, so it is looked at before, where Ray has chosen the node. What befalls the writer
    Ray would print in the training, thousands of lines of it. It also turns on faulthandler, which needs a standard
    error with a descriptor.
    """
    from ray._private import ray_constants, services, worker

    hook = getattr(ray_constants, UV_HOOK, None)
    choose: Callable[..., Any] | None = getattr(services, "get_node_to_connect_for_driver", None)

    def choose_living(*args: Any, **kwargs: Any) -> Any:
        assert choose is not None
        if "timeout_seconds" in signature(choose).parameters:
            kwargs.setdefault("timeout_seconds", LOCAL_NODE_S)
        node = choose(*args, **kwargs)
        for name in ("raylet_socket_name", "object_store_socket_name"):
            path = getattr(node, name, None)
            if path and not socket_answers(path):
                raise RayletGone(f"Ray's node on this machine has ended or lost its socket {path}")
        return node

    def enable(*args: Any, **kwargs: Any) -> None:
        with suppress(Exception):  # standard error is a notebook's, a logger's, or none, and has no descriptor
            dump(*args, **kwargs)

    listen = getattr(worker, "listen_error_messages", None)
    dump = faulthandler.enable

    faulthandler.enable = enable
    if hook is not None:
        setattr(ray_constants, UV_HOOK, False)
    if listen is not None:
        worker.listen_error_messages = lambda *_, **__: None
    if choose is not None:
        services.get_node_to_connect_for_driver = choose_living
    try:
        yield
    finally:
        faulthandler.enable = dump
        if hook is not None:
            setattr(ray_constants, UV_HOOK, hook)
        if choose is not None:
            services.get_node_to_connect_for_driver = choose
        if listen is not None:
            worker.listen_error_messages = listen
