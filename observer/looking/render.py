"""What a terminal shows. Nothing else knows its markup, its width and its encoding; JSON is made here as well."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

import msgspec
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from swanlab_ray.actors.wire.secret_shapes import masker
from swanlab_ray.actors.wire.text import one_line

UNBOUNDED = 10_000
"""Characters of a line where no terminal folds them."""


def terminal() -> Console:
    """Standard output: what is printed there is text, never markup. In a pipe or a file nothing is folded."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNBOUNDED
    return console


def cell(text: object, style: str = "") -> Text:
    """One line of text as it is: no markup, nothing that a terminal obeys, only what its encoding has, no secrets."""
    return Text(_encodable(shown(str(text))), style)


def shown(text: str) -> str:
    """A text as one line without secrets: what a journal of an older version, or of somebody else, may hold."""
    return one_line(_mask()(text))


@cache
def _mask() -> Callable[[str], str]:
    return lru_cache(maxsize=1_000)(masker())  # a timeline has the same few names again and again


def say(console: Console, text: object, style: str = "") -> None:
    """Print a line, which the terminal may wrap, so that what is copied from it is whole."""
    console.print(cell(text, style), soft_wrap=True)


def headline(console: Console, text: object) -> None:
    """A line with a rule behind it, where there is room for that."""
    title = cell(text)
    if title.cell_len + 4 <= console.width < UNBOUNDED:
        console.rule(title, align="left")
    else:
        say(console, text)


def _encodable(text: str) -> str:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a :class:`Grid`.

    Args:
        name: its header.
        right: numbers stand to the right.
        least: characters to which it may be folded; 0: it is never folded.
    """

    name: str
    right: bool = False
    least: int = 0


class Grid:
    """Rows below headers; where the terminal is too narrow for that, the values of each row below one another."""

    def __init__(self, *columns: Column) -> None:
        self._columns = columns
        self._rows: list[tuple[Text, ...]] = []

    def add(self, *cells: Text | str) -> None:
        """Add a row, a cell for each column."""
        self._rows.append(tuple(one if isinstance(one, Text) else cell(one) for one in cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        widths = self._widths(options.max_width)
        if widths is None:
            yield from self._list()
        else:
            yield self._table(widths)

    def _widths(self, most: int) -> list[int] | None:
        """What each column gets of so many characters; None: they are too few."""
        wanted = [
            max([cell_len(column.name), *(row[number].cell_len for row in self._rows)])
            for number, column in enumerate(self._columns)
        ]
        widths = [min(width, column.least or width) for column, width in zip(self._columns, wanted, strict=True)]
        left = most - sum(widths) - len(widths) - 1  # of the lines between them
        if left < 0:
            return None
        for number, width in enumerate(wanted):
            more = min(width - widths[number], left)
            widths[number] += more
            left -= more
        return widths

    def _table(self, widths: list[int]) -> Table:
        table = Table(box=box.ROUNDED, padding=0)
        for column, width in zip(self._columns, widths, strict=True):
            justify: Literal["left", "right"] = "right" if column.right else "left"
            table.add_column(cell(column.name), justify=justify, overflow="fold", width=width)
        for row in self._rows:
            table.add_row(*row)
        return table

    def _list(self) -> Iterator[Text]:
        for row in self._rows:
            for number, (column, one) in enumerate(zip(self._columns, row, strict=True)):
                line = Text.assemble("  " if number else "", cell(column.name), ": ", one)
                line.overflow = "fold"
                yield line


def json_text(value: Any, masking: bool = True) -> str:
    """JSON that every reader takes: there is no NaN in it, and no half of a character.

    Args:
        value: of plain types and msgspec's.
        masking: leave out secrets, see :func:`shown`; not where the texts are what the user has logged.
    """
    return _encode(_plain(msgspec.to_builtins(value, str_keys=True), _mask() if masking else str))


_encode = json.JSONEncoder(allow_nan=False).encode


def _plain(value: Any, mask: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        text = mask(value)
        return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_plain(key, mask): _plain(one, mask) for key, one in value.items()}
    return [_plain(one, mask) for one in value] if isinstance(value, (list, tuple)) else value
