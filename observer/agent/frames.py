"""What a rank and the agent of its machine say to each other: frames of plain bytes over a Unix socket.

A frame is its length (4 bytes, big-endian) and as many bytes of msgpack: the number of the call, what it is, and its
body, whose type follows from that. An answer has the number of its call.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, SecretStr

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.messages import Ack, Farewell, Goodbye, Hello, NumberedBatch, Sign
from swanlab_ray.actors.wire.status import WriterStatus
from swanlab_ray.observer.agent.reach import Head

_LENGTH = struct.Struct(">I")
RECEIVED_AT_ONCE = 1 << 18

T = TypeVar("T")


class Frame(msgspec.Struct, array_like=True):
    number: int
    what: str
    """Of a call: the method. Of an answer: empty, or how the connection to the writer broke."""
    body: msgspec.Raw


class Opening(msgspec.Struct):
    """A rank's first call."""

    hello: Hello
    run_id: str
    settings: dict[str, Any]
    """With secrets: the socket is this user's alone."""
    head: Head | None = None
    """Where it is to be passed on to; None: to Ray."""

    may_start: bool = True
    """Whether a cluster may be started for it."""

    def __repr__(self) -> str:
        return f"Opening(run_id={self.run_id!r})"


class Ingest(msgspec.Struct, array_like=True):
    """A sign of life, with a batch or without."""

    sign: Sign
    batch: NumberedBatch | None


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no message")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)


def encoded(number: int, what: str, body: Any) -> bytes:
    """A frame, ready to be sent."""
    data = _encoder.encode(Frame(number, what, msgspec.Raw(_encoder.encode(body))))
    return _LENGTH.pack(len(data)) + data


def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind, dec_hook=lambda model, value: model.model_validate(value))


# Made here, by the one thread that imports this: msgspec (0.22) crashes the process where two threads are the first to
# decode a type.
_frames = msgspec.msgpack.Decoder(Frame)
_KINDS: tuple[type, ...] = (Opening, Ingest, Goodbye, Ack, Farewell, WriterStatus, Head, str, bytes)
_bodies = {kind: _decoder(kind) for kind in _KINDS}


def decoded(body: bytes | msgspec.Raw, kind: type[T]) -> T:
    """A frame's body."""
    value: T = _bodies[kind].decode(body)
    return value


SECRETS = tuple(name for name, field in ObserverSettings.model_fields.items() if field.annotation == SecretStr | None)
"""Fields of the settings."""


def told(settings: ObserverSettings) -> dict[str, Any]:
    """Settings as plain values, with secrets."""
    secrets = {name: value.get_secret_value() for name, value in settings if isinstance(value, SecretStr)}
    return settings.public() | secrets


class Stream:
    """Frames over a socket, from whatever thread.

    Args:
        connected: the socket, which is closed with it.
        patience: seconds that the other side may take nothing.
    """

    def __init__(self, connected: socket.socket, patience: float) -> None:
        self.socket = connected
        self._sending = threading.Lock()
        self._received = bytearray()
        self._poll = select.poll()
        self._poll.register(connected, select.POLLIN)
        connected.settimeout(patience)

    def pass_on(self, frame: Frame) -> None:
        """Send what another stream has received."""
        data = _encoder.encode(frame)
        self.send(_LENGTH.pack(len(data)) + data)

    def send(self, frame: bytes) -> None:
        """Raises ``OSError`` where the other side is gone, or takes nothing."""
        with self._sending:
            try:
                self.socket.sendall(frame)
            except OSError:
                self.shut()  # a part of the frame may have gone
                raise

    def receive(self, wait: float) -> Frame | None:
        """The next frame; None where none has come within ``wait`` seconds.

        Raises:
            OSError: the connection is broken.
            EOFError: the other side is gone.
        """
        while (frame := self._next()) is None:
            if not self._poll.poll(wait * 1000):
                return None
            more = self.socket.recv(RECEIVED_AT_ONCE)
            if not more:
                raise EOFError("the other side has ended")
            self._received += more
        return frame

    def _next(self) -> Frame | None:
        if len(self._received) < _LENGTH.size:
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(self._received)[0]
        if len(self._received) < end:
            return None
        data = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        frame: Frame = _frames.decode(data)
        return frame

    def shut(self) -> None:
        """End the connection for both sides, whoever waits on it."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shut()
        self.socket.close()
