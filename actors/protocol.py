"""What ranks and the writer say to each other.

A rank sends *events* in numbered *batches*. An event is encoded once, on the thread that logs it, and stays as these
bytes until the writer reads it. Everything is msgpack; the messages are small typed values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

NAMESPACE = "swanlab-ray"
"""The Ray namespace of every writer."""

ACTOR_PREFIX = "swanlab-writer:"

State = Literal["success", "crashed", "aborted"]
"""How a rank, and a run, can end: the words SwanLab uses."""

BEAT_S = 2.0
"""Seconds between two signs of life of a rank."""
EVENTS_PER_BATCH = 8192
BATCH_BYTES = 1 << 20

# Whose value a scalar is, and so what the writer makes of it over ranks.
JOB = 0
"""Already reduced over ranks (Trainer logs): written under its own name."""
USER = 1
"""Logged by the user's code: its own name, and the view over ranks where several ranks log it."""
RANK = 2
"""A rank's own measurement (its loss, its step time): only the view over ranks."""

SCALARS, CONFIG, PROGRESS, OUTCOME = 0, 1, 2, 3


class Scalars(msgspec.Struct, array_like=True, tag=SCALARS, frozen=True, gc=False):
    """One ``log()`` call. ``time_ns`` is Unix time in nanoseconds, ``values`` is flat."""

    step: int
    time_ns: int
    scope: int
    values: dict[str, float]


class Config(msgspec.Struct, array_like=True, tag=CONFIG, frozen=True):
    """Configuration of the run, nested as the user gave it, without secrets."""

    values: dict[str, Any]


class Progress(msgspec.Struct, array_like=True, tag=PROGRESS, frozen=True):
    """How far a rank is. ``max_steps`` is 0 where it is not known."""

    step: int
    max_steps: int
    epoch: float | None = None


class Outcome(msgspec.Struct, array_like=True, tag=OUTCOME, frozen=True):
    """How this rank has ended should it never be heard of again; ``None``: it is at work.

    Ray Train ends a worker without running its exit handlers, so a training that is over says so at once.
    """

    state: State | None
    error: str | None
    time_ns: int


Event = Scalars | Config | Progress | Outcome


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


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    next_seq: int
    """The batch the writer wants next from this rank."""
    flush_interval: float
    """Seconds between two batches that the writer can bear at this world size."""
    notices: list[str]
    """Sentences for the user of this rank."""


class Ack(msgspec.Struct, frozen=True, array_like=True):
    next_seq: int
    flush_interval: float
    notices: list[str]


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """A sign of life, with what the rank has counted so far."""

    rank: int
    life: str
    logged: int
    dropped: int


class Goodbye(msgspec.Struct, frozen=True, kw_only=True):
    rank: int
    life: str
    state: State
    error: str | None
    time_ns: int
    """When the rank ended, Unix nanoseconds: the first failure is the cause."""
    logged: int
    dropped: int


class Farewell(msgspec.Struct, frozen=True, array_like=True):
    last: bool
    """This was the last rank: it may wait until the run is closed."""
    notices: list[str]


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
    silent: float
    """Seconds since its last sign of life."""
    logged: int
    received: int
    dropped: int


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
    """SwanLab's record is complete on disk (or given up, which a notice then says)."""
    world_size: int
    ranks: list[RankStatus]
    step: int | None
    max_steps: int
    epoch: float | None
    loss: float | None
    received: int
    """Events (``log()`` calls and others) taken from the ranks."""
    written: int
    """Scalars handed to SwanLab."""
    thinned: int
    """Scalars not handed to SwanLab because it could not keep up."""
    withheld: int
    """NaN and infinite scalars kept from SwanLab's local dashboard, which they break."""
    late: int
    """Values that came after their step was reduced over ranks."""
    rejected: int
    """Values that are no numbers."""
    dropped: int
    """Events that ranks had to drop, or that an earlier writer took with it."""
    lag: float
    """Seconds by which SwanLab is behind."""
    run_dir: str | None
    url: str | None
    notices: list[str]


_encoder = msgspec.msgpack.Encoder()
_events = msgspec.msgpack.Decoder(list[Event])
_one_event = msgspec.msgpack.Decoder(Event)
_raw_events = msgspec.msgpack.Decoder(list[msgspec.Raw])
_loose = msgspec.msgpack.Decoder()


def encode_batch(events: Iterable[bytes]) -> bytes:
    """Join encoded events into one batch."""
    return _encoder.encode([msgspec.Raw(event) for event in events])


def count_events(batch: bytes) -> int:
    """How many events a batch holds."""
    return len(_raw_events.decode(batch))


class Rejected(msgspec.Struct, frozen=True):
    """A value that cannot be written: its key and why."""

    key: str
    reason: str


def decode_batch(batch: bytes) -> tuple[list[Event], list[Rejected]]:
    """The events of a batch, flat and numeric, and the values that had to be rejected.

    Almost every batch is decoded by typed C code in one go; only one that holds nested dicts, booleans, or values that
    are no numbers is read event by event.
    """
    try:
        return _events.decode(batch), []
    except msgspec.ValidationError:
        pass
    events: list[Event] = []
    rejected: list[Rejected] = []
    for raw in _raw_events.decode(batch):
        try:
            events.append(_one_event.decode(raw))
        except msgspec.ValidationError as error:
            loose = _loose.decode(raw)
            if loose[0] != SCALARS:
                rejected.append(Rejected("config", str(error)))
                continue
            _, step, time_ns, scope, values = loose
            flat: dict[str, float] = {}
            _flatten(values, "", flat, rejected)
            if flat:
                events.append(Scalars(step, time_ns, scope, flat))
    return events, rejected


def _flatten(values: dict[Any, Any], prefix: str, into: dict[str, float], rejected: list[Rejected]) -> None:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            _flatten(value, f"{key}/", into, rejected)
        elif isinstance(value, (int, float)):
            into[key] = float(value)
        else:
            rejected.append(Rejected(key, f"{_shown(value)} is not a number"))


def _shown(value: Any) -> str:
    if value is None:
        return "None"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
