"""The writer's status in one line, for its log tab and the terminal."""

from __future__ import annotations

import shlex

from swanlab_ray.actors.wire.protocol import Hang, WriterStatus
from swanlab_ray.actors.wire.text import first_line

HANGS = "No rank has made a step"
REPEATED = "Logged twice: "
"""How these sentences begin."""


def ending(status: WriterStatus) -> str:
    """How a run ended and where it lies, in one sentence for its user."""
    where = status.url or status.run_dir or status.journal
    upload = f" (upload it with: swanlab-ray sync {shlex.quote(status.journal)})" if status.mode == "offline" else ""
    error = f", {first_line(status.error)}" if status.error else ""
    return f"run {status.run_id} ended: {status.state}{error}; {where}{upload}"


def status_line(status: WriterStatus) -> str:
    """Such as ``running | step 120/500 | ranks 8/8 | loss 2.31 | events 4100 | lag 0.3 s | dropped 0``."""
    running = sum(rank.state == "running" for rank in status.ranks)
    parts = [status.state]
    if status.step is not None:
        parts.append(f"step {status.step}" + (f"/{status.max_steps}" if status.max_steps else ""))
    if status.epoch is not None:
        parts.append(f"epoch {status.epoch:.2f}")
    parts.append(f"ranks {running}/{status.world_size}")
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4g}")
    parts += [
        f"events {status.received}",
        f"written {status.written}",
        f"lag {status.lag:.1f} s",
        f"dropped {status.dropped}",
    ]
    if status.completions:
        parts.append(f"completions {status.completions}")
    if status.hang:
        parts.append("hangs")
    if status.straggler:
        parts.append(f"straggler {status.straggler}")
    if status.spans_dropped:
        parts.append(f"spans dropped {status.spans_dropped}")
    for name in ("spooled", "thinned", "withheld", "late", "repeated", "rejected"):
        if count := getattr(status, name):
            parts.append(f"{name} {count}")
    if status.error:
        parts.append(first_line(status.error))
    return " | ".join(parts)


def standstill(hang: Hang) -> str:
    """What there is to say of a job that hangs."""
    return f"{HANGS} for {duration(hang.seconds)}. {hang.text}"


def duration(seconds: float) -> str:
    """Such as ``3 d 4 h``, ``2 h 5 min`` or ``40 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{count} {unit}" for count, unit in ((days, "d"), (hours, "h"), (minutes, "min")) if count]
    return " ".join(parts[:2]) or f"{rest} s"
