"""What stands in a journal: control records, which are pydantic models, and batches, as the ranks sent them.

A record is one byte that says which of both, then the control record as JSON, or a fixed head and the batch's bytes.
Readers skip control records they do not know, and refuse a journal of a newer :data:`VERSION`.
"""

from __future__ import annotations

import json
import struct
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from swanlab_ray.actors.wire.events import State
from swanlab_ray.actors.wire.messages import End, Process

VERSION = 1

REDUCTION_VERSION = 3
"""Rises with every change of which rows the same entries reduce to: what was delivered is counted in rows."""

_CONTROL, _BATCH = b"C", b"B"
_HEAD = struct.Struct("<c16sIQQI")  # kind, life, rank, seq, received, events


class UnknownFormat(ValueError):
    """This is no journal, or one of a newer version."""


class _Control(BaseModel):
    model_config = ConfigDict(frozen=True)

    time_ns: int = Field(default_factory=time.time_ns)
    """When it was written, Unix nanoseconds."""


class Header(_Control):
    """The first record of every file."""

    type: Literal["header"] = "header"
    format: Literal["swanlab-ray"] = "swanlab-ray"
    version: int = VERSION
    kind: Literal["journal", "spool"]
    run_id: str
    epoch: int
    """Number of this file; each incarnation of the writer begins a higher one. For a spool, the rank."""
    host: str
    pid: int
    settings: dict[str, Any]
    """The run's settings without secrets."""
    package: str = ""
    """The version of swanlab-ray that wrote it; empty where that is not known."""
    reduction_version: int = 0
    """The writer's :data:`REDUCTION_VERSION`."""


class Arrived(_Control, Process):
    """A rank said hello for the first time in this life."""

    type: Literal["arrived"] = "arrived"

    @classmethod
    def of(cls, process: Process, time_ns: int | None = None) -> Arrived:
        """The record of a hello that came at ``time_ns``; by default now."""
        return cls(time_ns=time_ns or time.time_ns(), **{name: getattr(process, name) for name in Process.model_fields})


class Ended(_Control, End):
    """A rank ended, or was lost."""

    type: Literal["ended"] = "ended"

    @classmethod
    def of(cls, end: End) -> Ended:
        """The record of what a rank has said."""
        return cls(**{name: getattr(end, name) for name in End.model_fields})


class Returned(_Control):
    """A rank that counted as lost was heard again."""

    type: Literal["returned"] = "returned"
    rank: int
    life: str


class Tick(_Control):
    """Time has passed without a batch, and values are waiting for ranks that are silent."""

    type: Literal["tick"] = "tick"


class Opened(_Control):
    """The SwanLab run was opened."""

    type: Literal["opened"] = "opened"
    mode: str
    run_dir: str | None = None
    url: str | None = None


class Delivered(_Control):
    """SwanLab's cloud has confirmed the first ``rows`` rows that this journal reduces to."""

    type: Literal["delivered"] = "delivered"
    rows: int
    reduction_version: int = 0
    """The :data:`REDUCTION_VERSION` by which they were counted; another one makes other rows of the same entries."""


class Alert(_Control):
    """A sentence for the user."""

    type: Literal["alert"] = "alert"
    text: str


class Notified(_Control):
    """A notification has arrived."""

    type: Literal["notified"] = "notified"
    key: str


class Finished(_Control):
    """How the run ended."""

    type: Literal["finished"] = "finished"
    state: State
    error: str | None = None


class Closed(_Control):
    """SwanLab's run was closed, or given up, and nothing follows."""

    type: Literal["closed"] = "closed"
    written: int
    """Scalars handed to SwanLab."""
    thinned: int
    withheld: int
    complete: bool
    """SwanLab has everything that this journal reduces to."""
    completions: int = 0
    """Rows of completions that came."""
    completions_dropped: int = 0
    """Those of them, and of those that their ranks left out, that got into no table."""
    late: int | None = None
    """Values that came after their step was reduced; None: the writer was of a version that did not tell."""
    repeated: int | None = None
    """Values of a rank for a name at a step that it had logged before; None as above."""


Control = Annotated[
    Header | Arrived | Ended | Returned | Tick | Opened | Delivered | Alert | Notified | Finished | Closed,
    Field(discriminator="type"),
]
_control: TypeAdapter[Any] = TypeAdapter(Control)


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of a rank."""

    rank: int
    life: str
    seq: int
    received_ns: int
    """When the writer took it (a spool: when the rank put it aside), Unix nanoseconds."""
    events: int
    data: bytes


Entry = Batch | Header | Arrived | Ended | Returned | Tick | Opened | Delivered | Alert | Notified | Finished | Closed


def pack(entry: Entry) -> bytes:
    """The bytes of a record."""
    if isinstance(entry, Batch):
        life = entry.life.encode()
        return _HEAD.pack(_BATCH, life, entry.rank, entry.seq, entry.received_ns, entry.events) + entry.data
    try:
        text = entry.model_dump_json()
    except PydanticSerializationError:  # an error may name a file whose name is no Unicode; JSON cannot hold that
        text = json.dumps(entry.model_dump(), ensure_ascii=False)
    return _CONTROL + text.encode(errors="replace")


def unpack(payload: bytes) -> Entry | None:
    """The record of these bytes; None if it is of a kind that this version does not know.

    Raises:
        UnknownFormat: the header is of another format or a newer version.
    """
    if payload[:1] == _BATCH and len(payload) >= _HEAD.size:
        _, life, rank, seq, received_ns, events = _HEAD.unpack_from(payload)
        return Batch(rank, life.rstrip(b"\0").decode(errors="replace"), seq, received_ns, events, payload[_HEAD.size :])
    if payload[:1] != _CONTROL:
        return None
    try:
        entry: Entry = _control.validate_json(payload[1:])
    except ValidationError as error:
        if error.errors()[0]["type"].startswith("union_tag"):
            return None
        raise UnknownFormat(f"a record is not understood: {error.errors()[0]['msg']}") from None
    if isinstance(entry, Header) and entry.version > VERSION:
        raise UnknownFormat(f"it is of version {entry.version}, and this program reads up to {VERSION}: update it")
    return entry
