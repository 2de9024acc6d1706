"""What the writer knows of its run, as ``swanlab-ray status`` asks for it; and in one line, for its log tab."""

from __future__ import annotations

import shlex

import msgspec

from swanlab_ray.actors.wire.text import first_line


class RankStatus(msgspec.Struct, frozen=True, kw_only=True):
    rank: int
    host: str
    pid: int
    gpu: str | None
    state: str
    """``running``, ``lost``, or how it ended."""
    step: int | None
    loss: float | None
    step_time: float | None
    """Seconds of its latest step."""
    error: str | None
    silent: float
    """Seconds since its last sign of life."""
    span: str
    """What it is doing, as in :class:`swanlab_ray.actors.wire.messages.Doing`."""
    idle: float | None
    """Seconds since it last got ahead."""
    logged: int
    """Events it has logged, as it said last."""
    received: int
    """Events of it in the journal."""
    spooled: int
    dropped: int
    behind: float = 0.0
    """Seconds by which the clock of its machine is behind the writer's."""


class Hang(msgspec.Struct, frozen=True, kw_only=True):
    """No rank gets ahead."""

    number: int
    """Unix time at which it was seen; what the ranks are asked for their stacks with."""
    seconds: float
    """How long no rank had got ahead when that was told."""
    text: str
    """Who is behind and where, and what the others wait in."""
    stacks: str
    """Of those that are behind, and of one that waits."""


class WriterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the writer knows, as shown by ``swanlab-ray status`` and on its log tab."""

    run_id: str
    project: str
    experiment: str | None
    mode: str
    state: str
    """``running``, or how the run ended."""
    error: str | None
    closed: bool
    """SwanLab's run is closed (or given up, which a notice then says), and the journal too."""
    pid: int
    """Of the writer's process."""
    world_size: int
    ranks: list[RankStatus]
    step: int | None
    max_steps: int
    epoch: float | None
    loss: float | None
    learning_rate: float | None
    journal: str
    """Directory of the journal."""
    received: int
    """Events (``log()`` calls and others) of all ranks in the journal."""
    written: int
    """Scalars handed to SwanLab; in cloud mode: confirmed by it."""
    thinned: int
    """Scalars not handed to SwanLab because it could not keep up."""
    withheld: int
    """NaN and infinite scalars kept from SwanLab's local dashboard, which they break."""
    completions: int
    """Rows of completions that came."""
    completions_dropped: int
    """Those, and those that ranks left out, that got into no table; the journal has what was sent of them."""
    hang: Hang | None
    straggler: str | None
    """The rank that others wait for at present, and the phase it loses the time in."""
    spans_dropped: int
    """Spans that ranks had to drop."""
    late: int
    """Values that came after their step was reduced over ranks."""
    repeated: int = 0
    """Values of a rank for a name at a step that it had logged before: the first one stands."""
    rejected: int
    """Values, and whole calls, that are no numbers or otherwise wrong; events that could not be worked off."""
    spooled: int
    """Events that ranks keep on their own disks."""
    dropped: int
    """Events that ranks had to drop, or that went with ranks that were killed."""
    killed: int
    """The latter of them."""
    lag: float
    """Seconds by which SwanLab is behind."""
    run_dir: str | None
    url: str | None
    notices: list[str]


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
