"""Keeps Ray from harming the process it is loaded into. Each guard names what it prevents."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from swanlab_ray.observer.ray_cluster import patches
from swanlab_ray.observer.script.notices import logger

# Ray's core installs a failure handler for these that aborts the process 3 s after SIGTERM.
_SIGNALS = (signal.SIGTERM, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGINT)


def set_environment() -> None:
    """Set what Ray reads when it is imported; what the user has set stays."""
    if "ray" in sys.modules and not patches.is_worker() and not patches.DRIVER_ENVIRONMENT.keys() <= os.environ.keys():
        logger.info(
            "Ray was imported before connect(), so a lost GCS may end this process after 60 s: import "
            "swanlab_ray.observer.session first, or export RAY_gcs_rpc_server_reconnect_timeout_s=1000000."
        )
    for name, value in patches.DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def occupy_standard_descriptors() -> None:
    """Where standard input, output or error are closed, Ray's sockets would get their numbers, and all that anybody
    prints would go into them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


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
