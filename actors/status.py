"""The writer's status in one line, for its log tab and the terminal."""

from __future__ import annotations

from swanlab_ray.actors.protocol import WriterStatus


def ending(status: WriterStatus) -> str:
    """How a run ended and where it lies, in one sentence for its user."""
    where = status.url or status.run_dir or "nothing was kept"
    upload = (
        f" (upload it with: swanlab sync {status.run_dir} --id {status.run_id})" if status.mode == "offline" else ""
    )
    error = f", {status.error.splitlines()[0]}" if status.error else ""
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
    for name in ("thinned", "withheld", "late", "rejected"):
        if count := getattr(status, name):
            parts.append(f"{name} {count}")
    if status.error:
        parts.append(status.error.splitlines()[0])
    return " | ".join(parts)
