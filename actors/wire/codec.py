"""Batches: events in one piece of msgpack. A large batch is compressed by the rank, and stays so on the wire and in the
journal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import zstandard

from swanlab_ray.actors.wire.events import KINDS, SCALARS, Event
from swanlab_ray.actors.wire.secret_shapes import MASK, hides, sensitivity

_encoder = msgspec.msgpack.Encoder()
_events = msgspec.msgpack.Decoder(list[Event])
_one_event = msgspec.msgpack.Decoder(Event)
_raw_events = msgspec.msgpack.Decoder(list[msgspec.Raw])
_loose = msgspec.msgpack.Decoder()


COMPRESS_BYTES = 512
"""Batches of this size and more are compressed: names repeat in every event."""
BATCH_LIMIT = 256 << 20
"""Bytes that a batch may unpack to; a larger one is no batch of ours."""
DEEPEST = 200
"""Mappings within each other; Python itself goes to a few times as many, depending on its version."""
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


def unpacked_size(batch: bytes) -> int:
    """Bytes of a batch before it was compressed, as it says."""
    if not batch.startswith(_PACKED):
        return len(batch)
    try:
        return max(len(batch), zstandard.frame_content_size(batch))
    except zstandard.ZstdError:
        return len(batch)


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
            name = KINDS[kind]
            flat: dict[str, float] = {}
            _flatten(values, "", flat, rejected)
            # By the decoder, so that the other fields are checked.
            return [_one_event.decode(_encoder.encode((SCALARS, step, time_ns, scope, flat)))] if flat else []
        if type(kind) is int and 0 <= kind < len(KINDS):
            name = KINDS[kind]
        else:
            name, reason = f"an event of kind {_shown(kind)}", "this version of swanlab-ray does not know it"
    except (*_BAD, AttributeError) as failure:
        reason = str(failure)
    rejected.append(Rejected(name, reason, whole=True))
    return []


def _flatten(
    values: dict[Any, Any], prefix: str, into: dict[str, float], rejected: list[Rejected], around: int = 0
) -> None:
    if around > DEEPEST:
        rejected.append(Rejected(f"{prefix[:40]}...", f"more than {DEEPEST} mappings lie within each other"))
        return
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            _flatten(value, f"{key}/", into, rejected, around + 1)
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
