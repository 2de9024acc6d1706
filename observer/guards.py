"""Keeps Ray from harming the process it is loaded into. Each guard names what it prevents."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from swanlab_ray.observer.notices import logger

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


def _is_ray_worker() -> bool:
    """Whether Ray has started this process, so that it ends with its node's raylet whatever is set."""
    core = sys.modules.get("ray._private.worker")
    try:
        return core is not None and bool(core.global_worker.mode == core.WORKER_MODE)
    except AttributeError:  # another thread is importing it
        return False


@contextmanager
def process_unchanged() -> Iterator[None]:
    """Put signal handlers and ``sys.excepthook`` back to what they were before the block.

    Handlers are saved and restored with sigaction(2), since Python's ``signal`` works on the main thread only and this
    runs on the flusher's. What the training itself changes meanwhile stays changed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    saved = {}
    for number in _SIGNALS:
        action = ctypes.create_string_buffer(256)  # more than struct sigaction on any platform
        if libc.sigaction(int(number), None, action) == 0:
            saved[number] = (action, signal.getsignal(number))
    hook = sys.excepthook
    try:
        yield
    finally:
        for number, (action, handler) in saved.items():
            if signal.getsignal(number) is handler:
                libc.sigaction(int(number), action, None)
        if sys.excepthook.__module__.startswith("ray."):
            sys.excepthook = hook
