"""Configurations as plain values, without the secrets in them, whatever people put there.

What comes out can be sent as msgpack and shown as JSON. Each part is looked at by itself: one that cannot be described
says so in its place, and costs no other.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import UserString
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from datetime import date, time
from enum import Enum
from itertools import islice
from typing import Any

from swanlab_ray.actors.wire.secret_shapes import MASK, Sensitivity, hides, masker, sensitivity

DEEPEST = 32
"""Values within each other that are kept."""
LONGEST_TEXT = 65_536
"""Characters."""
LONGEST_LIST = 1_000
_OPTION = re.compile(r"--?[A-Za-z][\w.-]{0,100}")
MOST_VALUES = 50_000
"""In one configuration; a long text counts as one value for each 100 characters."""


def plain(value: Any, name: str = "") -> Any:
    """A copy made of dicts, lists, text, numbers of 64 bits, truth values and None. Secrets are masked: by their names,
    by how they look, and by where they stand. What is too long, too deep or cyclic is cut, with a mark. Never raises.
    """
    return _Copy().of(value, sensitivity(name))


def configuration(values: Any) -> dict[str, Any]:
    """The same of a whole configuration: a mapping, ``argparse.Namespace``, dataclass, ...; what has no names stands
    under ``config``."""
    copied = plain({} if values is None else values)
    return copied if isinstance(copied, dict) else {"config": copied}


class _Copy:
    """One configuration that is copied."""

    def __init__(self) -> None:
        self._mask = masker()
        self._inside: set[int] = set()
        self._left = MOST_VALUES

    def of(self, value: Any, how: Sensitivity) -> Any:
        """A part of it, under a name of this sensitivity."""
        try:
            return self._known(value, how)
        except Exception as error:
            return f"({_kind(value)} cannot be shown: {_kind(error)})"

    def _known(self, value: Any, how: Sensitivity) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, Enum):
            return self.of(value.value if isinstance(value.value, (str, int, float)) else value.name, how)
        if isinstance(value, (str, bytes, bytearray, os.PathLike, UserString)):
            return self._text(value, how)
        if (how is Sensitivity.SECRET and not _is_empty(value)) or hasattr(type(value), "get_secret_value"):
            return MASK
        return _number(value) if isinstance(value, (int, float)) else self._composed(value, how)

    def _composed(self, value: Any, how: Sensitivity) -> Any:
        if id(value) in self._inside:
            return f"({_kind(value)} that contains itself)"
        if len(self._inside) >= DEEPEST:
            return f"({_kind(value)}, too deep)"
        self._inside.add(id(value))
        try:
            items = _items(value)
            if items is not None:
                return self._dict(items, how)
            return self._list(value, how) if isinstance(value, (Sequence, Set)) else self._single(value, how)
        finally:
            self._inside.discard(id(value))

    def _dict(self, items: Iterator[tuple[Any, Any]], how: Sensitivity) -> dict[str, Any]:
        copied: dict[str, Any] = {}
        inherited = how if how is Sensitivity.TOKEN else Sensitivity.NONE
        for key, value in self._each(items, ("...", "(more)")):
            name = self.of(key if isinstance(key, str) else _text_of(key), Sensitivity.NONE)
            while name in copied:
                name += "'"  # 1 and "1" are two keys
            copied[name] = self.of(value, sensitivity(name) or inherited)
        told = copied.get("name", copied.get("key"))  # {"name": "API_KEY", "value": ...}, as Kubernetes writes it
        if isinstance(told, str) and isinstance(copied.get("value"), str) and hides(sensitivity(told), copied["value"]):
            copied["value"] = MASK
        return copied

    def _list(self, values: Iterable[Any], how: Sensitivity) -> list[Any]:
        kept = list(self._each(iter(values), "(more)"))
        pair = len(kept) == 2
        copied: list[Any] = []
        named = Sensitivity.NONE  # what stands before: ["--api-key", ...], ("password", ...)
        for number, value in enumerate(kept):
            text = value if isinstance(value, str) else ""
            copied.append(self.of(value, how if text.startswith("--") else max(how, named)))
            named = Sensitivity.NONE
            if _OPTION.fullmatch(text):
                named = sensitivity(text)
            elif pair and number == 0 and sensitivity(text) is Sensitivity.SECRET and isinstance(kept[1], str):
                named = Sensitivity.SECRET
        return copied

    def _each(self, values: Iterator[Any], mark: Any) -> Iterator[Any]:
        """What a container holds, up to a bound or to where it fails, and there the mark."""
        taken = 0
        try:
            for value in islice(values, LONGEST_LIST):
                self._left -= 1
                if self._left < 0:
                    break
                taken += 1
                yield value
            else:
                if taken < LONGEST_LIST or next(values, self) is self:
                    return
        except Exception:
            pass
        yield mark

    def _text(self, value: Any, how: Sensitivity) -> str:
        if isinstance(value, (bytes, bytearray)):
            value = bytes(value[:LONGEST_TEXT]).decode("utf-8", "replace")
        elif not isinstance(value, str):
            value = value.data if isinstance(value, UserString) else os.fsdecode(os.fspath(value))
        text = str.__str__(value)
        if hides(how, text[:LONGEST_TEXT]):
            return MASK
        self._left -= len(text) // 100
        longest = LONGEST_TEXT if self._left > 0 else 100
        cut = f"... ({len(text)} characters)" if len(text) > longest else ""
        return self._mask(text[:longest]).encode("utf-8", "replace").decode() + cut

    def _single(self, value: Any, how: Sensitivity) -> Any:
        """What has no parts, or is an array."""
        if hasattr(value, "dtype") and hasattr(value, "shape"):
            size = math.prod(value.shape)
            if size > LONGEST_LIST or getattr(getattr(value, "device", None), "type", "cpu") != "cpu":
                return f"({_kind(value)} of shape {tuple(value.shape)})"  # reading it could wait for a GPU
            return self.of(value.item() if size == 1 else value.tolist(), how)
        if isinstance(value, (date, time)):
            return value.isoformat()
        if hasattr(type(value), "__float__"):  # Decimal, Fraction
            return _number(float(value))
        return self._text(_text_of(value), how)


def _number(value: float) -> float | str:
    """A number of at most 64 bits that JSON knows."""
    if isinstance(value, int):
        whole = int.__index__(value)
        if -(1 << 63) <= whole < 1 << 64:
            return whole
        try:
            return float(whole)
        except OverflowError:
            return f"(a whole number of {whole.bit_length()} bits)"
    number = float.__float__(value)
    if math.isfinite(number):
        return number
    return "NaN" if number != number else "Inf" if number > 0 else "-Inf"  # as SwanLab writes them


def _items(value: Any) -> Iterator[tuple[Any, Any]] | None:
    """Names and values of what has named parts; None for anything else."""
    if isinstance(value, Mapping):
        return (pair for pair in value.items() if isinstance(pair, tuple) and len(pair) == 2)
    fields = None if isinstance(value, type) else _fields(value)
    if fields is not None:
        return ((field, _part(value, field)) for field in fields)
    described = getattr(value, "to_dict", None)  # configurations of Transformers, PEFT and others
    if callable(described) and not hasattr(type(value), "__len__") and not isinstance(value, type):
        with suppress(Exception):
            return iter(dict(described()).items())
    return None


def _fields(value: Any) -> Iterable[str] | None:
    kind = type(value)
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    if hasattr(kind, "__pydantic_fields__"):
        return [*kind.__pydantic_fields__, *(getattr(value, "model_extra", None) or ())]
    if hasattr(kind, "__attrs_attrs__"):
        return [field.name for field in kind.__attrs_attrs__]
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return list(kind._fields)
    if hasattr(kind, "__struct_fields__"):  # msgspec
        return list(kind.__struct_fields__)
    # argparse.Namespace and the like are nothing but their attributes.
    return (
        list(vars(value))
        if kind.__module__ in ("argparse", "types", "optparse") and hasattr(value, "__dict__")
        else None
    )


def _part(value: Any, field: str) -> Any:
    try:
        return getattr(value, field)
    except Exception as error:
        return f"(cannot be read: {_kind(error)})"


def _is_empty(value: Any) -> bool:
    return isinstance(value, (Mapping, Sequence, Set)) and not len(value)


def _text_of(value: Any) -> str:
    try:
        return str(value)
    except Exception as error:
        return f"({_kind(value)} cannot be shown: {_kind(error)})"


def _kind(value: Any) -> str:
    name: str = type.__getattribute__(type(value), "__name__")
    return name
