"""From what people log to bytes, on the thread that logs: encoded at once, so later changes do not show.

Plain numbers, numpy numbers and 0-d CPU tensors become floats here. A value on a GPU is copied to the host without
waiting for the GPU, and read by the flusher. None, strings and lists are passed on; the writer rejects them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import msgspec


class OnDevice(Exception):
    """A value lies on a GPU: reading it now would wait for everything that is queued there."""


def _to_float(value: Any) -> float:
    if getattr(value, "is_cuda", False):
        raise OnDevice
    if isinstance(value, HostCopy):
        value = value.read()
    try:
        detach = getattr(value, "detach", None)  # a tensor that needs a gradient warns when it is read
        return float(value if detach is None else detach())
    except Exception:
        raise TypeError(f"{type(value).__name__} is not a number") from None


encode = msgspec.msgpack.Encoder(enc_hook=_to_float).encode
"""Encode an event. Raises TypeError for what is no number, :class:`OnDevice` for a value on a GPU."""


def salvage(data: Mapping[Any, Any], reject: Callable[[str, str], None], prefix: str = "") -> dict[str, Any]:
    """The part of ``data`` that can be written, flat; each other value is named to ``reject(key, reason)``.

    Values on a GPU become a :class:`HostCopy`.
    """
    kept: dict[str, Any] = {}
    for name, value in data.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            kept.update(salvage(value, reject, f"{key}/"))
            continue
        try:
            if value is None or isinstance(value, (str, bytes)):
                raise TypeError(f"{'None' if value is None else type(value).__name__} is not a number")
            key.encode()  # a lone surrogate cannot be sent
            kept[key] = _to_float(value)
        except OnDevice:
            try:
                kept[key] = HostCopy(value.reshape(()))
            except Exception:
                reject(key, f"{type(value).__name__} on a GPU is not a single number")
        except (TypeError, ValueError) as error:
            reject(key, str(error))
    return kept


class HostCopy:
    """A CUDA tensor on its way to pinned memory.

    The copy is queued on the current stream, so a later in-place change of the tensor does not show.
    """

    def __init__(self, tensor: Any) -> None:
        import torch

        source = tensor.detach()
        self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._host.copy_(source, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(source.device))

    def ready(self) -> bool:
        """Whether it has arrived. Never waits for the GPU."""
        return bool(self._copied.query())

    def read(self) -> Any:
        """The tensor on the host, once it has arrived."""
        return self._host


class Copy(Protocol):
    """Something on its way from a GPU."""

    def ready(self) -> bool: ...


class Deferred:
    """An event that is encoded by the flusher: its values are on their way from a GPU, or take time to put in order.

    Args:
        copies: what has to arrive before.
        encode: makes the encoded event then.
        lost: called instead where there was no room for it.
    """

    def __init__(
        self, copies: Iterable[Copy], encode: Callable[[], bytes], lost: Callable[[], None] = lambda: None
    ) -> None:
        self._copies = tuple(copies)
        self.encode = encode
        self.lost = lost

    def ready(self) -> bool:
        """Whether everything has arrived."""
        return all(copy.ready() for copy in self._copies)
