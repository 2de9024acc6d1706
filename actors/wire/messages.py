"""What ranks and the writer say to each other: small typed values, and how the two find each other."""

from __future__ import annotations

from typing import Any

import msgspec

from swanlab_ray.actors.wire.events import State

NAMESPACE = "swanlab-ray"
"""The Ray namespace of every writer."""

ACTOR_PREFIX = "swanlab-writer:"

BEAT_S = 2.0
"""Seconds between two signs of life of a rank, at the most; a batch is one."""
EVENTS_PER_BATCH = 8192
BATCH_BYTES = 1 << 20
WINDOW = 4
"""Batches of a rank that may be under way, not acknowledged yet."""


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """A rank introduces itself, at the start and again after every reconnection."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    pid: int
    pid_namespace: str
    """Identifies host and container, so that the writer knows whether it could see this process."""
    gpu: str | None
    life: str
    """Unique to this process: a rank that is started again has another one."""
    next_seq: int
    """The first batch it can still send."""
    restarts: int = 0
    """How often its launcher starts the job again after failures, in all."""
    attempt: int = 0
    """How often the launcher has started the job's processes again so far, where that is known."""
    nonce: str = ""
    """The same for all processes of a job and for no other job; empty where nothing tells that."""
    version: str = ""
    """Of the package; empty in versions that did not tell."""
    sent_ns: int = 0
    """Unix time at which this was sent, by the rank's clock; 0 where it does not tell."""
    settings: dict[str, Any] | None = None
    """The settings this rank was given, without secrets."""


class Ack(msgspec.Struct, frozen=True, array_like=True):
    """How far the writer is with this rank: the answer to every message."""

    durable: int
    """Batches below this one are in the journal, synced to disk: the rank may forget them."""
    next_seq: int
    """The batch the writer wants next. Those between are on their way to the disk."""
    flush_interval: float
    """Seconds between two batches that the writer can bear at this world size."""
    notices: list[str]
    """Sentences for the user of this rank."""
    stacks: int = 0
    """The rank is asked for its :class:`swanlab_ray.actors.wire.events.Stacks`, once for each number; 0: it is not."""


class Declined(msgspec.Struct, frozen=True):
    """The answer to the hello of a process that may not report now: it keeps what it logs, and asks again."""

    sentence: str
    """Why, for its user; empty while that is not sure."""


class Counted(msgspec.Struct, frozen=True, array_like=True):
    """What a rank has counted, in events."""

    logged: int
    spooled: int
    """On its own disk, and not taken by the writer."""
    dropped: dict[str, int]
    """By reason."""
    refused: int = 0
    """Values, and whole calls, that were wrong and are no events: ``log(step="a")``, a list for a number."""


class Doing(msgspec.Struct, frozen=True, array_like=True):
    """What a rank is doing."""

    step: int | None
    """The step under way, or the last one logged."""
    span: str
    """The open spans of the thread that trains, such as ``evaluate > forward``; empty where there is none."""
    idle: float
    """Seconds since it last got ahead: began another step, or ended a span."""


class Sign(msgspec.Struct, frozen=True, array_like=True):
    """A sign of life: it goes with every batch, and alone where there is none to send."""

    rank: int
    life: str
    counted: Counted
    doing: Doing | None = None
    sent_ns: int = 0
    """As in :class:`Hello`."""


class NumberedBatch(msgspec.Struct, frozen=True, array_like=True):
    """Events as a rank sends them."""

    seq: int
    """The rank's batches count up from 0."""
    events: int
    """How many there are in it."""
    data: bytes


class Goodbye(msgspec.Struct, frozen=True, kw_only=True):
    rank: int
    life: str
    state: State
    error: str | None
    time_ns: int
    """When the rank ended, Unix nanoseconds by its clock: the first failure is the cause."""
    counted: Counted
    sent_ns: int = 0
    """As in :class:`Hello`."""


class Farewell(msgspec.Struct, frozen=True, array_like=True):
    last: bool
    """This was the last rank: it may wait until the run is closed."""
    notices: list[str]
    told: int = 0
    """How many of the run's notices rank 0 has been told."""
