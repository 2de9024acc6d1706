"""From what people log to bytes, on the thread that logs: encoded at once, so later changes do not show.

Plain numbers, numpy numbers and 0-d CPU tensors become floats here. A value on a GPU is copied to the host without
waiting for the GPU, and read by the flusher. None, strings and lists are passed on; the writer rejects them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec


class OnDevice(Exception):
    """A value lies on a GPU: reading it now would wait for everything that is queued there."""


def _to_float(value: Any) -> float:
    if getattr(value, "is_cuda", False):
        raise OnDevice
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
                kept[key] = HostCopy(value)
            except Exception:
                reject(key, f"{type(value).__name__} on a GPU is not a single number")
        except (TypeError, ValueError) as error:
            reject(key, str(error))
    return kept


class HostCopy:
    """A 0-d CUDA tensor on its way to pinned memory.

    The copy is queued on the current stream, so a later in-place change of the tensor does not show.
    """

    def __init__(self, tensor: Any) -> None:
        import torch

        self._host = torch.empty((), dtype=torch.float64, pin_memory=True)
        self._host.copy_(tensor.detach().reshape(()), non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(tensor.device))

    def ready(self) -> bool:
        """Whether it has arrived. Never waits for the GPU."""
        return bool(self._copied.query())

    def read(self) -> float:
        """The value, once it has arrived."""
        return float(self._host)


class Deferred:
    """An event with values that are still on their way from a GPU."""

    def __init__(self, values: dict[str, Any], encode_values: Callable[[dict[str, Any]], bytes]) -> None:
        self._values = values
        self._encode = encode_values

    def ready(self) -> bool:
        """Whether all of them have arrived."""
        return all(value.ready() for value in self._values.values() if isinstance(value, HostCopy))

    def encode(self) -> bytes:
        """The encoded event, once it is ready."""
        read = {key: value.read() if isinstance(value, HostCopy) else value for key, value in self._values.items()}
        return self._encode(read)
