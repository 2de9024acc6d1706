"""From what people log to bytes, on the thread that logs: encoded at once, so later changes do not show.

Plain numbers, numpy numbers, and CPU tensors and arrays of one element become floats here. A value on a GPU is copied
to the host without waiting for the GPU, and read by the flusher. None, strings and lists are passed on; the writer
rejects them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import msgspec


class OnDevice(Exception):
    """A value lies on a GPU: reading it now would wait for everything that is queued there."""


class NotANumber(TypeError):
    """A value cannot be logged. The message says why, and what to log instead."""


DEEPEST = 32
"""Mappings within each other that are followed."""


def _to_float(value: Any) -> float:
    try:
        value = undistributed(value)
        if getattr(value, "is_cuda", False):
            raise OnDevice
        if isinstance(value, HostCopy):
            value = value.read()
        if getattr(value, "mask", False) is not False and bool(value.mask):
            raise NotANumber(f"{type(value).__name__} is masked; log numbers")
        detach = getattr(value, "detach", None)  # a tensor that needs a gradient warns when it is read
        if detach is not None:
            value = detach()
        elif getattr(value, "size", None) == 1:  # an array of one element, as a tensor of one is taken too
            value = value.item()
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (OnDevice, NotANumber):
        raise
    except OverflowError:
        raise NotANumber(f"{type(value).__name__} is too large; log numbers below 1.8e308") from None
    except Exception:
        pass
    raise NotANumber(f"{type(value).__name__} is not a number; log numbers")


def undistributed(value: Any) -> Any:
    """The tensor that a DTensor stands for, where this rank has all of it.

    Raises:
        NotANumber: it has a part; the whole would take a collective, which only the training may start.
    """
    placements = getattr(value, "placements", None)
    if placements is None or not hasattr(value, "to_local"):
        return value
    if value.device_mesh.size() == 1 or all(placement.is_replicate() for placement in placements):
        return value.to_local()
    parts = ", ".join(map(str, placements))
    raise NotANumber(f"it is only this rank's part of a {type(value).__name__} ({parts}); log its full_tensor()")


encode = msgspec.msgpack.Encoder(enc_hook=_to_float, decimal_format="number").encode
"""Encode an event.

Raises:
    NotANumber: a value is none.
    OnDevice: a value is on a GPU.
    Exception: what msgspec cannot encode: huge integers, lone surrogates, mappings that contain themselves.
"""


def salvage(data: Mapping[Any, Any], reject: Callable[[str, str], None]) -> dict[str, Any]:
    """The part of ``data`` that can be written, flat; each other value is named to ``reject(key, reason)``.

    Values on a GPU become a :class:`HostCopy`.
    """
    kept: dict[str, Any] = {}
    _salvage(data, "", kept, reject, ())
    return kept


def _salvage(
    data: Mapping[Any, Any],
    prefix: str,
    kept: dict[str, Any],
    reject: Callable[[str, str], None],
    around: tuple[int, ...],
) -> None:
    if id(data) in around or len(around) >= DEEPEST:
        reject(prefix.rstrip("/"), "it contains itself, or more mappings within each other than anybody reads")
        return
    try:
        items = _items(data)
    except Exception as error:
        reject(prefix.rstrip("/"), f"its items cannot be read ({type(error).__name__})")
        return
    for name, value in items:
        key, why, nested, number = "", "", False, None
        try:
            key = f"{prefix}{name}"
            key.encode()  # a lone surrogate cannot be sent
            nested = isinstance(value, Mapping)
            number = None if nested else _number(value)
        except NotANumber as error:
            why = str(error)
        except Exception as error:
            why = f"its name cannot be sent ({type(error).__name__})"
        if why:
            reject(key or f"{prefix}{type(name).__name__}", why)
        elif nested:
            _salvage(value, f"{key}/", kept, reject, (*around, id(data)))
        else:
            kept[key] = number


def _items(data: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """A mapping's items, though another thread may be changing it."""
    for _ in range(10):
        try:
            return list(data.items())
        except RuntimeError:
            continue
    return list(data.items())


def _number(value: Any) -> float | HostCopy:
    if value is None or isinstance(value, (str, bytes)):
        raise NotANumber(f"{'None' if value is None else type(value).__name__} is not a number; log numbers")
    try:
        return _to_float(value)
    except OnDevice:
        try:
            return HostCopy(undistributed(value).reshape(()))
        except NotANumber:
            raise
        except Exception:
            raise NotANumber(f"{type(value).__name__} on a GPU is not a single number; log numbers") from None


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
