"""What ranks and the writer say to each other: small typed values, and how the two find each other."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict

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


class RunEnded(Exception):
    """The run is closing. Whoever still wants to write needs a new writer."""


class Fenced(Exception):
    """A newer writer has taken over the run; this one acknowledges nothing any more."""


class UnknownRank(Exception):
    """This writer does not know the rank in this life, or from its journal only: it must say hello."""


class Said(BaseModel):
    """What a rank says of itself, and the journal keeps."""

    model_config = ConfigDict(frozen=True)

    def __reduce__(self) -> tuple[Any, ...]:
        # Whoever reads it may be of another version: what it does not know is left out, what it misses is a default,
        # so that a new field must have one.
        return type(self).model_validate, (dict(self),)


class Counts(Said):
    """What a rank has counted in one life, in events: ``logged = written + spooled + dropped`` once it has ended."""

    logged: int = 0
    spooled: int = 0
    """Kept on the rank's own disk, and not taken by the writer: for ``swanlab-ray sync``."""
    dropped: dict[str, int] = {}
    """By reason."""
    refused: int = 0
    """Values, and whole calls, that were wrong and are no events: ``log(step="a")``, a list for a number."""


class Process(Said):
    """A process of the training in one life of its rank."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    pid: int
    pid_namespace: str
    """Identifies host and container, so that the writer knows whether it could see this process."""
    gpu: str | None = None
    life: str
    """Unique to this process: a rank that is started again has another one."""
    restarts: int = 0
    """How often its launcher starts the job again after failures, in all."""
    attempt: int = 0
    """How often the launcher has started the job's processes again so far, where that is known."""
    nonce: str = ""
    """The same for all processes of a job and for no other job; empty where nothing tells that."""
    version: str = ""
    """Of the package; empty in versions that did not tell."""


class Hello(Process):
    """A rank introduces itself, at the start and again after every reconnection."""

    next_seq: int
    """The first batch it can still send."""
    sent_ns: int = 0
    """Unix time at which this was sent, by the rank's clock; 0 where it does not tell."""
    settings: dict[str, Any] | None = None
    """The settings this rank was given, without secrets."""


class End(Said):
    """How a life of a rank ended."""

    rank: int
    life: str
    state: State | Literal["lost"]
    """``lost``: by the writer's judgement, where the rank has said nothing."""
    error: str | None = None
    ended_ns: int
    """When, Unix nanoseconds: by the rank's clock as it says so, by the writer's in its journal."""
    counts: Counts = Counts()


class Goodbye(End):
    """A rank says how it ends."""

    sent_ns: int = 0
    """As in :class:`Hello`."""


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
    counted: Counts
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


class Farewell(msgspec.Struct, frozen=True, array_like=True):
    last: bool
    """This was the last rank: it may wait until the run is closed."""
    notices: list[str]
    told: int = 0
    """How many of the run's notices rank 0 has been told."""
