"""A process's own log: the writer's, the log tab that people see first in the Ray dashboard, and an agent's."""

from __future__ import annotations

import sys
from contextlib import suppress

from swanlab_ray.actors.wire.text import harmless


def log(text: str) -> None:
    """Write lines to it."""
    with suppress(Exception):  # a full disk, a stream that is closed or none at all
        sys.stderr.write(f"{harmless(text)}\n")
        sys.stderr.flush()
