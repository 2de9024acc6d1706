"""What this rank is doing, as its flusher thread sees it: for its signs of life, and for the day the job hangs."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from time import monotonic, time_ns
from types import FrameType

from swanlab_ray.actors.wire.events import STACKS
from swanlab_ray.actors.wire.messages import Doing
from swanlab_ray.observer.encoding.cells import plain_text
from swanlab_ray.observer.encoding.numbers import encode
from swanlab_ray.observer.timing.spans import SpanLog

THREADS = 16
FRAMES = 64
"""The most of each thread that are told."""
OWN_FILES = os.path.dirname(os.path.dirname(__file__))
OWN_THREADS = "swanlab-ray"
"""How the names of our own threads begin."""


class Pulse:
    """Watches the thread that makes it, without touching it.

    Args:
        spans: of this rank.
        step: the step under way, or the last one logged.
    """

    def __init__(self, spans: SpanLog, step: Callable[[], int | None]) -> None:
        self._spans = spans
        self._step = step
        self._thread = threading.get_ident()
        self._native = threading.get_native_id()
        self._mark: tuple[int | None, int] = (None, 0)
        self._moved = monotonic()

    def look(self) -> None:
        """See whether the training got ahead since the last look."""
        mark = (self._step(), self._spans.ended)
        if mark != self._mark:
            self._mark, self._moved = mark, monotonic()

    def doing(self) -> Doing:
        """For a sign of life."""
        self.look()
        return Doing(self._mark[0], self._spans.open_names(), monotonic() - self._moved)

    def stacks(self) -> bytes:
        """The event that tells where the threads of this process stand."""
        frames = sys._current_frames()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        others = [
            ident
            for ident in frames
            if ident not in (self._thread, threading.get_ident()) and not names.get(ident, "").startswith(OWN_THREADS)
        ]
        idents = [ident for ident in [self._thread, *others[: THREADS - 1]] if ident in frames]
        return encode(
            (
                STACKS,
                time_ns(),
                self._mark[0],
                self._spans.open_names(),
                self._busy(),
                ["training" if ident == self._thread else plain_text(names.get(ident, "?")) for ident in idents],
                [_described(frames[ident]) for ident in idents],
            )
        )

    def _busy(self) -> bool | None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return None  # CUDA waits busily
        try:
            with open(f"/proc/self/task/{self._native}/stat") as stat:
                return stat.read().rpartition(")")[2].split()[0] == "R"
        except OSError:
            return None


def _described(frame: FrameType | None) -> list[str]:
    """Neither values nor lines of code: both may hold a secret."""
    described: list[str] = []
    # Ours are left out: what is measured is of interest, not what measures.
    while frame is not None and len(described) < FRAMES:
        if not frame.f_code.co_filename.startswith(OWN_FILES):
            code = frame.f_code
            described.append(plain_text(f"{code.co_filename}:{frame.f_lineno} in {code.co_qualname}"))
        frame = frame.f_back
    return described
