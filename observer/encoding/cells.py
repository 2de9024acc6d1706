"""Values as cells of a row of completions: text, numbers, truth values, conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from swanlab_ray.actors.wire.events import Cell
from swanlab_ray.observer.encoding.numbers import HostCopy, NotANumber, undistributed
from swanlab_ray.observer.script.never_raises import str_of

Columns = dict[str, list[Any]]
"""Of cells, see :data:`swanlab_ray.actors.wire.events.Cell`; while they are made, also of copies from a GPU."""


class NoCell(TypeError):
    """A value is no cell. The message says what it is."""


def columns_of(rows: Sequence[Mapping[Any, Any]], reject: Callable[[str, str], None]) -> Columns:
    """Rows of the user's as columns, in the order in which names appear.

    Args:
        rows: one mapping for each sample.
        reject: ``reject(name, why)`` is told of a value that is no cell; it is left empty.
    """
    columns: Columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        cells: list[Any] = []
        for row in rows:
            value = row.get(name)
            try:
                cells.append(plain_cell(value))
            except Exception as error:  # a value may be anything
                told = isinstance(error, (NoCell, NotANumber))
                reject(str_of(name), str(error) if told else f"{type(value).__name__} cannot be read")
                cells.append(None)
        columns[plain_text(str_of(name))] = cells
    return columns


def plain_cell(value: Any) -> Cell | HostCopy:
    """A value as a cell: text, a number, a truth value, or nothing. Messages of a conversation become text, a number on
    a GPU becomes a copy on its way.

    Raises:
        NoCell: it is none of these.
        NotANumber: it is a part of one.
        Exception: what the value itself raises.
    """
    if isinstance(value, int) and abs(value) >= 1 << 63:
        try:
            return float(value)
        except OverflowError:
            raise NoCell(f"a whole number of {value.bit_length()} bits is too large") from None
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # a lone surrogate cannot be sent
    if isinstance(value, (list, tuple)) and all(isinstance(message, Mapping) for message in value):
        return plain_text(value)
    value = undistributed(value)
    if getattr(value, "is_cuda", False) and value.numel() == 1:
        return HostCopy(value.reshape(()))
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "size", None) is not None and getattr(value, "ndim", 1) == 0:
        return plain_cell(item())
    raise NoCell(f"{type(value).__name__} is neither text nor a number")


def plain_text(value: Any) -> str:
    """Text as it is; a conversation with a line for each message."""
    if isinstance(value, (list, tuple)):
        value = "\n".join(_messages(value))
    return str(value).encode("utf-8", "replace").decode()


def _messages(messages: Iterable[Any]) -> Iterator[str]:
    for message in messages:
        if not isinstance(message, Mapping):
            yield str(message)
            continue
        content = message.get("content")
        if content is None:
            content = message.get("tool_calls", "")
        elif isinstance(content, list):
            content = "".join(
                part.get("text", f"<{part.get('type', '?')}>") if isinstance(part, Mapping) else str(part)
                for part in content
            )
        yield f"{message.get('role', '?')}: {content}"
