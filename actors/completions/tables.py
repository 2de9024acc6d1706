"""Rows of completions as SwanLab shows them: text instead of token ids, a table in the cloud, texts on the local
dashboard, which shows no tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from swanlab_ray.actors.completions.buffers import CompletionRow
from swanlab_ray.actors.wire.events import Cell, Tokenizer
from swanlab_ray.actors.wire.text import harmless

MEDIA_BYTES = 10 * 1024**2
"""SwanLab drops a larger file."""
MEDIA_ITEMS = 108
"""SwanLab drops what is more at one step."""
_ORDER = (
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "label",
    "reward",
    "reward_chosen",
    "reward_rejected",
    "reward_diff",
    "advantage",
    "log_odds_ratio",
    "logp_diff",
    "logp_chosen",
    "logp_rejected",
)
_PLACEHOLDER = "--x_x--0_0--"
"""pyecharts takes this for code, and leaves broken JSON behind."""

Shown = None | bool | int | float | str
"""A cell as people see it."""


class Table(NamedTuple):
    """Rows of a table."""

    headers: list[str]
    rows: list[list[Shown]]


class Decoder:
    """Makes text of token ids with the tokenizers that the ranks sent."""

    def __init__(self, notice: Callable[[str], None] = lambda sentence: None) -> None:
        self._definitions: dict[str, bytes] = {}
        self._loaded: dict[str, Any] = {}
        self._notice = notice

    def learn(self, tokenizer: Tokenizer) -> None:
        """Keep a tokenizer; it is loaded when it is needed."""
        self._definitions[tokenizer.name] = tokenizer.definition

    def text(self, cell: Cell, tokenizer: str) -> Shown:
        """Token ids as text, or as numbers where there is no tokenizer for them; anything else as it is."""
        if not isinstance(cell, bytes):
            return cell
        ids = [int.from_bytes(cell[at : at + 4], "little") for at in range(0, len(cell), 4)]
        loaded = self._load(tokenizer)
        if loaded is None:
            return f"token ids {' '.join(map(str, ids))}"
        return str(loaded.decode(ids, skip_special_tokens=False))

    def _load(self, name: str) -> Any:
        if name not in self._loaded and name in self._definitions:
            try:
                import tokenizers

                self._loaded[name] = tokenizers.Tokenizer.from_str(self._definitions[name].decode())
            except Exception as error:
                self._loaded[name] = None
                self._notice(
                    "Completions are shown as token ids: the writer cannot load the ranks' tokenizer "
                    f"({type(error).__name__}: {error}); install `tokenizers` where it runs."
                )
        return self._loaded.get(name)


def table(rows: list[CompletionRow], text: Callable[[Cell, str], Shown], limit: int) -> Table:
    """Rows as a table: step and rank first, then the columns of all of them in a fixed order.

    Args:
        text: makes text of token ids; see :meth:`Decoder.text`.
        limit: characters of a cell; what is cut is marked.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row.cells))
    columns.sort(key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    headers = _headers(columns)
    cells = [
        [row.step, row.rank, *(_cell(text(row.cells.get(name), row.tokenizer), limit) for name in columns)]
        for row in rows
    ]
    return Table(headers, cells)


def _headers(columns: Iterable[str]) -> list[str]:
    """Names as headers: each once, and without the dots that would make a path of them."""
    headers = ["step", "rank"]
    for name in columns:
        header = safe(name).replace(".", "_")
        while header in headers:
            header += "_"
        headers.append(header)
    return headers


def _cell(value: Shown, limit: int) -> Shown:
    if isinstance(value, str):
        if len(value) > limit:
            value = f"{value[:limit]} [... {len(value) - limit} more characters]"
        return safe(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def safe(text: str) -> str:
    """Text that neither a table nor a terminal takes for anything else: control characters become their symbols."""
    return harmless(text.replace(_PLACEHOLDER, "--x_x--0_0 --"))


def as_charts(whole: Table) -> list[Any]:
    """A table as SwanLab's tables, each below what it takes as one file."""
    from swanlab import echarts

    chart = echarts.Table().add(whole.headers, whole.rows)
    if len(chart.dump_options().encode()) < MEDIA_BYTES:
        return [chart]
    if len(whole.rows) == 1:
        half = max((len(cell) for cell in whole.rows[0] if isinstance(cell, str)), default=0) // 2
        return [] if half < 100 else as_charts(Table(whole.headers, [[_cell(cell, half) for cell in whole.rows[0]]]))
    middle = len(whole.rows) // 2
    halves = whole.rows[:middle], whole.rows[middle:]
    return [chart for rows in halves for chart in as_charts(Table(whole.headers, rows))]


def as_texts(whole: Table) -> list[Any]:
    """A table as texts for the local dashboard, a row each, or several where there are too many."""
    from swanlab import Text

    each = -(-len(whole.rows) // MEDIA_ITEMS)
    texts = []
    for first in range(0, len(whole.rows), each):
        rows = whole.rows[first : first + each]
        captions = [f"step {row[0]} rank {row[1]}" for row in rows]
        contents = [readable(whole.headers[2:], row[2:]) for row in rows]
        if each > 1:
            contents = [f"{caption}\n{content}" for caption, content in zip(captions, contents, strict=True)]
        texts.append(Text("\n\n".join(contents), caption=", ".join(dict.fromkeys(captions))))
    return texts


def readable(headers: list[str], row: list[Shown]) -> str:
    """A row for reading: a line for each value."""
    lines = (
        f"{name}: {value:.6g}" if isinstance(value, float) else safe(f"{name}: {value}")
        for name, value in zip(headers, row, strict=True)
        if value is not None
    )
    return "\n".join(lines)
