"""Prints how many times as long everything takes here as on the machine that the tests were written on.

``make test`` measures it once, before it starts anything: what two processes get done beside each other, so that a
slow core, a missing one and a share of one all count. See ``SLOWNESS`` in :mod:`tests.conftest`.
"""

from __future__ import annotations

import subprocess
import sys

SECONDS = 0.3
ROUNDS = 3
LOOPS = 2000.0
"""What two free cores did in that time there, in loops of the kind below."""

_LOOP = f"""
import time
done, end = 0, time.monotonic() + {SECONDS}
while time.monotonic() < end:
    sum(range(20_000))
    done += 1
print(done)
"""


def measured() -> float:
    """At least 1; of a few rounds, the best one, since somebody else may have used the machine just then."""
    return max(1.0, LOOPS / max(_round() for _ in range(ROUNDS)))


def _round() -> int:
    two = [subprocess.Popen([sys.executable, "-S", "-c", _LOOP], stdout=subprocess.PIPE) for _ in range(2)]
    return sum(int(process.communicate()[0]) for process in two) or 1


if __name__ == "__main__":
    print(f"{measured():.1f}")
