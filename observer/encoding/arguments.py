"""What is passed to ``log()`` and its siblings besides numbers: steps, rows, errors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from swanlab_ray.actors.wire.secret_shapes import masked
from swanlab_ray.observer.script.never_raises import Wrong, shown, str_of

MOST = (1 << 63) - 1
"""The highest step: what SwanLab can keep."""
LONGEST_ERROR = 65_536
"""Characters of an error that is given in words."""


def checked_step(step: Any) -> int:
    """A step as it is sent.

    Raises:
        Wrong: it is none.
    """
    try:
        number = operator.index(step)
    except Exception:
        what = f"step {shown(step)!r}" if isinstance(step, str) else f"step {shown(step)}"
        raise Wrong(
            f"step {type(step)}", f"{what} is not a whole number: pass an int of 0 or more, or leave it out."
        ) from None
    if number < 0:
        raise Wrong("step < 0", f"step {shown(number)} is negative: pass an int of 0 or more, or leave it out.")
    if number > MOST:
        raise Wrong("step > 63 bits", f"A step has {number.bit_length()} bits, 63 are the most: pass a smaller one.")
    return number


def rows_of(rows: Any, reject: Callable[[str, str], None]) -> list[dict[Any, Any]]:
    """The rows that are such; each other is told to ``reject(name, reason)``.

    Raises:
        Wrong: these are no rows at all.
    """
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        sentence = f"log_completions() takes a list of dicts, one for each sample, not {shown(rows)}."
        raise Wrong(f"rows {type(rows)}", sentence)
    good: list[dict[Any, Any]] = []
    try:
        for row in rows:
            if isinstance(row, Mapping):
                good.append(dict(row))
            else:
                reject("a row of log_completions()", f"it is {type(row).__name__}, not a dict")
    except Wrong:
        raise
    except Exception as error:
        reject("the rest of log_completions()", f"it cannot be read ({type(error).__name__})")
    return good


def readable(error: object) -> str | None:
    """An error, which may be an exception, without its secrets. It may name a file whose name is no Unicode; such text
    cannot be sent."""
    return None if error is None else masked(str_of(error)[:LONGEST_ERROR]).encode("utf-8", "replace").decode()
