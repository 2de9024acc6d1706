"""Times of a run on one scale, though the clocks of its machines differ and are set: they tell what came first."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

SAMPLES = 8
"""Messages of a rank by which its clock is judged: the one that was on its way for the shortest time counts."""
SAMPLE_NS = 2_000_000_000
"""What lies so close together counts as one: all of it may have been on its way for long."""
AGREE_NS = 1_000_000_000
"""Clocks that agree to a second are kept in step by somebody, to more than what a message tells."""
SET_NS = 60 * 1_000_000_000
"""A clock that differs by so much more than by the last message was set in between."""


class RunClock:
    """Unix time, in nanoseconds, that never goes back whatever is done to this machine's clock.

    Args:
        after_ns: the latest moment that the run's journal knows, perhaps of a machine whose clock is ahead.
        unix_ns, monotonic_ns: the clocks of this machine.
    """

    def __init__(
        self,
        after_ns: int = 0,
        unix_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._monotonic_ns = monotonic_ns
        self._began = max(unix_ns(), after_ns) - monotonic_ns()

    def now_ns(self) -> int:
        """The present moment."""
        return self._began + self._monotonic_ns()

    def now(self) -> float:
        """The same in seconds."""
        return self.now_ns() / 1e9


class Skew:
    """How far a rank's clock is behind the writer's, from when its messages were sent and when they came."""

    def __init__(self) -> None:
        self._behind: deque[int] = deque(maxlen=SAMPLES)
        self._begun_ns = 0  # when the first of the latest sample came

    def heard(self, sent_ns: int, now_ns: int) -> None:
        """A message was sent then by the rank's clock (0: it does not say), and has come now by the writer's."""
        if not sent_ns:
            return
        behind = now_ns - sent_ns
        if self._behind and abs(behind - self._behind[-1]) > SET_NS:
            self._behind.clear()
        if self._behind and 0 <= now_ns - self._begun_ns < SAMPLE_NS:
            self._behind[-1] = min(self._behind[-1], behind)
        else:
            self._begun_ns = now_ns
            self._behind.append(behind)

    @property
    def seconds(self) -> float:
        """By which it is behind, as far as messages tell."""
        return min(self._behind, default=0) / 1e9

    def corrected(self, moment_ns: int) -> int:
        """A moment by the rank's clock, on the writer's scale."""
        behind = min(self._behind, default=0)
        return moment_ns + behind if abs(behind) > AGREE_NS else moment_ns
