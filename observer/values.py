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

    Values on a GPU become callables that wait for their copy (see :func:`copy_to_host`).
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
            kept[key] = _to_float(value)
        except OnDevice:
            kept[key] = copy_to_host(value)
        except TypeError as error:
            reject(key, str(error))
    return kept


def copy_to_host(tensor: Any) -> Callable[[], float]:
    """Start copying a 0-d CUDA tensor to pinned memory; the returned function waits for it and reads it.

    The copy is queued on the current stream, so a later in-place change of the tensor does not show.
    """
    import torch

    host = torch.empty((), dtype=torch.float64, pin_memory=True)
    host.copy_(tensor.detach().reshape(()), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def read() -> float:
        copied.synchronize()
        return float(host)

    return read
