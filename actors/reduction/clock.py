"""The time of a reduction, which is what a run's entries say and never goes back."""

from __future__ import annotations

LEAP_S = 5.0
"""A longer time between two entries is no waiting: while values wait, the writer notes down each second. It is a clock
that was set, or a writer that was away."""


class Clock:
    """Adds up the time between entries, by whatever clock each of them was written.

    A clock that is set back, or a writer on a machine whose clock is behind, lets no time pass; one that is far ahead,
    be it for good or for one entry only, lets pass :data:`LEAP_S` at the most.
    """

    def __init__(self) -> None:
        self._latest_ns: int | None = None
        self.now = 1.0
        """Seconds since some time."""

    def read(self, time_ns: int) -> float:
        """The time at an entry of this Unix time in nanoseconds."""
        if self._latest_ns is not None and time_ns > self._latest_ns:
            self.now += min((time_ns - self._latest_ns) / 1e9, LEAP_S)
        self._latest_ns = time_ns
        return self.now
