"""What ranks and the writer say to each other.

A rank sends *events* in numbered *batches*. An event is encoded once, on the thread that logs it, and stays as these
bytes until the writer reads it. Everything is msgpack; the messages are small typed values. A large batch is compressed
by the rank, and stays so on the wire and in the journal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
import zstandard

from swanlab_ray.actors.wire.secret_shapes import MASK, hides, sensitivity

NAMESPACE = "swanlab-ray"
"""The Ray namespace of every writer."""

ACTOR_PREFIX = "swanlab-writer:"

State = Literal["success", "crashed", "aborted"]
"""How a rank, and a run, can end: the words SwanLab uses."""

BEAT_S = 2.0
"""Seconds between two signs of life of a rank."""
EVENTS_PER_BATCH = 8192
BATCH_BYTES = 1 << 20
WINDOW = 4
"""Batches of a rank that may be under way, not acknowledged yet."""

# Whose value a scalar is, and so what the writer makes of it over ranks.
JOB = 0
"""Already reduced over ranks (Trainer logs): written under its own name."""
USER = 1
"""Logged by the user's code: its own name, and the view over ranks where several ranks log it."""
RANK = 2
"""A rank's own measurement (its loss, its step time): only the view over ranks."""

SCALARS, CONFIG, PROGRESS, OUTCOME, COMPLETIONS, TOKENIZER, SPANS, STACKS = range(8)
_KINDS = ("scalars", "config", "progress", "outcome", "completions", "tokenizer", "spans", "stacks")

Step = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
"""What SwanLab can hold."""


def _check(columns_fit: bool) -> None:
    """Part of decoding an event that another version, or a damaged memory, has written."""
    if not columns_fit:
        raise ValueError("its columns do not fit together")


class Scalars(msgspec.Struct, array_like=True, tag=SCALARS, frozen=True, gc=False):
    """One ``log()`` call. ``time_ns`` is Unix time in nanoseconds, ``values`` is flat."""

    step: Step
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


Cell = None | bool | int | float | str | bytes
"""A value of a row of completions; bytes are token ids, little-endian 32-bit integers."""


class Completions(msgspec.Struct, array_like=True, tag=COMPLETIONS, frozen=True):
    """Rows of what a model was shown or has said, as columns of one length."""

    step: Step
    time_ns: int
    algorithm: str
    """``dpo``, ``grpo``, ...; empty for rows of the user's own."""
    tokenizer: str
    """Name of the :class:`Tokenizer` of the token ids; empty where there are none."""
    left_out: int
    """Rows of this rank's batch that do not fit the table's bound, and were not sent."""
    columns: dict[str, list[Any]]
    """Of :data:`Cell`; msgspec has no union of text and bytes."""

    def __post_init__(self) -> None:
        _check(len(set(map(len, self.columns.values()))) <= 1)

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(next(iter(self.columns.values()), []))


class Tokenizer(msgspec.Struct, array_like=True, tag=TOKENIZER, frozen=True):
    """What makes text of token ids, as the ``tokenizers`` library writes it (JSON)."""

    name: str
    definition: bytes


class Spans(msgspec.Struct, array_like=True, tag=SPANS, frozen=True):
    """What a rank was doing when: spans that have ended, in the order of their ends, as columns of one length.

    Times are in nanoseconds, by the clock of the rank's host.
    """

    time_ns: int
    """Unix time at which this was put together, just before it was sent."""
    begin_ns: int
    """Unix time from which :attr:`begins` count."""
    dropped: int
    """Spans that found no room since the last event."""
    names: list[str]
    threads: list[str]
    """The first is the thread that trains."""
    thread: list[int]
    """Index into :attr:`threads`."""
    name: list[int]
    """Index into :attr:`names`."""
    step: list[int]
    begins: list[int]
    durations: list[int]
    parents: list[int]
    """Of a span in an asyncio task, how much earlier the one around it has begun; -1 where there is none. 0 for a span
    in no task, which nests by its times; empty where all are such."""
    gpu: list[int]
    """Time between CUDA events at begin and end; -1 where that was not measured, empty where nothing was."""

    def __post_init__(self) -> None:
        count = len(self.name)
        _check(all(len(column) == count for column in (self.thread, self.step, self.begins, self.durations)))
        _check(all(len(column) in (0, count) for column in (self.parents, self.gpu)))
        for column, names in ((self.thread, self.threads), (self.name, self.names)):
            _check(not column or (min(column) >= 0 and max(column) < len(names)))


class Stacks(msgspec.Struct, array_like=True, tag=STACKS, frozen=True):
    """Where the threads of a rank stand, while the job does not get ahead."""

    time_ns: int
    step: int | None
    span: str
    """As in :class:`Doing`."""
    busy: bool | None
    """The thread that trains is on a CPU, and does not wait; None where that cannot be seen."""
    threads: list[str]
    """Their names; the first is the thread that trains."""
    frames: list[list[str]]
    """Of each thread, such as ``/job/train.py:88 in load``, the innermost first."""

    def __post_init__(self) -> None:
        _check(len(self.threads) == len(self.frames))


Event = Scalars | Config | Progress | Outcome | Completions | Tokenizer | Spans | Stacks


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
    """The rank is asked for its :class:`Stacks`, once for each number; 0: it is not."""


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


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """A sign of life."""

    rank: int
    life: str
    counted: Counted
    doing: Doing | None = None
    sent_ns: int = 0
    """As in :class:`Hello`."""


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
    """What it is doing, as in :class:`Doing`."""
    idle: float | None
    """Seconds since it last got ahead."""
    logged: int
    """Events it has logged, as it said last."""
    received: int
    """Events of it in the journal."""
    spooled: int
    dropped: int


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


_encoder = msgspec.msgpack.Encoder()
_events = msgspec.msgpack.Decoder(list[Event])
_one_event = msgspec.msgpack.Decoder(Event)
_raw_events = msgspec.msgpack.Decoder(list[msgspec.Raw])
_loose = msgspec.msgpack.Decoder()


COMPRESS_BYTES = 512
"""Batches of this size and more are compressed: names repeat in every event."""
BATCH_LIMIT = 256 << 20
"""Bytes that a batch may unpack to; a larger one is no batch of ours."""
_PACKED = zstandard.FRAME_HEADER
_BAD = (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError)
"""What decoding bytes raises that are not what they should be."""


class Undecodable(ValueError):
    """A batch that this version cannot read: its checksum is right, so it was sent like that."""


class Rejected(msgspec.Struct, frozen=True):
    """A value that cannot be written, or an event that is not understood: its key or kind, and why."""

    key: str
    reason: str
    whole: bool = False
    """It is an event that this version does not understand."""

    @property
    def sentence(self) -> str:
        """For the user of the rank that has logged it."""
        advice = "is the same version of swanlab-ray installed on all machines?" if self.whole else "log numbers."
        return f"'{self.key}' is not logged: {self.reason}; {advice}"


def encode_batch(events: Iterable[bytes]) -> bytes:
    """Join encoded events into one batch."""
    batch = _encoder.encode([msgspec.Raw(event) for event in events])
    return batch if len(batch) < COMPRESS_BYTES else zstandard.ZstdCompressor(level=1).compress(batch)


def decode_batch(batch: bytes) -> tuple[list[Event], list[Rejected]]:
    """The events of a batch, flat and numeric, and what of it had to be rejected.

    Almost every batch is decoded by typed C code in one go; only one that holds nested dicts, booleans, values that are
    no numbers, or what another version has sent is read event by event.

    Raises:
        Undecodable: it is no batch, or a larger one than there can be.
    """
    try:
        unpacked = _unpacked(batch)
        try:
            return _events.decode(unpacked), []
        except _BAD:
            raws = _raw_events.decode(unpacked)
    except (*_BAD, zstandard.ZstdError) as error:
        raise Undecodable(str(error)) from error
    events: list[Event] = []
    rejected: list[Rejected] = []
    for raw in raws:
        try:
            events.append(_one_event.decode(raw))
        except _BAD as error:
            events += _understood(raw, str(error), rejected)
    return events, rejected


def _unpacked(batch: bytes) -> bytes:
    if not batch.startswith(_PACKED):
        return batch
    size = zstandard.frame_content_size(batch)
    if not 0 <= size <= BATCH_LIMIT:  # max_output_size is heeded only where a frame does not say its size; ours do
        raise ValueError(f"it unpacks to {size if size >= 0 else 'an unknown number of'} bytes")
    return zstandard.ZstdDecompressor().decompress(batch)


def _understood(raw: msgspec.Raw, error: str, rejected: list[Rejected]) -> list[Event]:
    """What can be kept of an event that is not as it should be; the rest of it is added to ``rejected``."""
    name, reason = "an event", error
    try:
        kind, *fields = _loose.decode(raw)
        if kind == SCALARS:
            step, time_ns, scope, values, *_ = fields
            name = _KINDS[kind]
            flat: dict[str, float] = {}
            _flatten(values, "", flat, rejected)
            # By the decoder, so that the other fields are checked.
            return [_one_event.decode(_encoder.encode((SCALARS, step, time_ns, scope, flat)))] if flat else []
        if type(kind) is int and 0 <= kind < len(_KINDS):
            name = _KINDS[kind]
        else:
            name, reason = f"an event of kind {_shown(kind)}", "this version of swanlab-ray does not know it"
    except (*_BAD, AttributeError) as failure:
        reason = str(failure)
    rejected.append(Rejected(name, reason, whole=True))
    return []


def _flatten(values: dict[Any, Any], prefix: str, into: dict[str, float], rejected: list[Rejected]) -> None:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            _flatten(value, f"{key}/", into, rejected)
        elif isinstance(value, (int, float)):
            into[key] = float(value)
        else:
            hidden = isinstance(value, str) and hides(sensitivity(key), value)
            rejected.append(Rejected(key, f"{f'str {MASK}' if hidden else _shown(value)} is not a number"))


def _shown(value: Any) -> str:
    if value is None:
        return "None"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
