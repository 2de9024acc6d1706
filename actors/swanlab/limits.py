"""What SwanLab takes of names, steps, times and configurations: its rules, applied by us before anything is sent, so
that a value it would refuse costs no other one and nothing is dropped without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

from swanlab_ray.actors.completions.buffers import TABLE
from swanlab_ray.actors.wire.text import one_line

NAME_CHARACTERS = 512
"""SwanLab cuts a longer name, so that two of them become one."""
HIGHEST_STEP = 1 << 48
LATEST_NS = 253_402_300_799 * 10**9
"""The end of the year 9999, in Unix nanoseconds."""
CONFIG_CHARACTERS = 16_384
"""Of one text in a configuration; what is cut is marked."""
CONFIG_DEPTH = 32
NAMES_TOLD = 20
"""More names that SwanLab does not take are only counted."""

_EDGES = "./" + "".join(filter(str.isspace, map(chr, range(0x3001))))
_SYSTEM = "__swanlab__."


class Limits:
    """Fits rows to what SwanLab takes. A name that it would not show as it is gets the nearest one that it does, unless
    another name of the run stands there: series are never mixed.

    Args:
        notice: takes a sentence for the user, one for each name.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice
        self._good: set[str] = set()
        self._odd: dict[str, str | None] = {}
        """Names that cannot stay as they are: what stands for them, or None for nothing."""
        self._mended: dict[str, str] = {}
        """Names that stand for others: which."""
        self._told: set[str] = set()

    def fit(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Those of the values that SwanLab takes, under the names that it takes them by."""
        if step > HIGHEST_STEP:
            for name in values:
                self.tell(name, f"'{shown(name)}' is not in SwanLab at step {step}: 2^48 is the highest it takes.")
            return {}
        if not self._good.issuperset(values):
            for name in values.keys() - self._good - self._odd.keys():
                if fitting(name) == name:
                    self._take(name)
            for name in values:  # in their order, once it is known which names are good
                if name not in self._good and name not in self._odd:
                    self._odd[name] = self._mend(name)
            if not self._good.issuperset(values):
                sent = {name: name if name in self._good else self._odd[name] for name in values}
                return {to: values[name] for name, to in sent.items() if to is not None}
        return values

    def tell(self, name: str, sentence: str) -> None:
        """Tell the user something of a name, once for each name."""
        if name in self._told or len(self._told) > NAMES_TOLD:
            return
        self._told.add(name)
        if len(self._told) > NAMES_TOLD:
            sentence = "SwanLab does not take more values than were told of; all are in the journal, and counted."
        self._notice(sentence)

    def _take(self, name: str) -> None:
        self._good.add(name)
        other = self._mended.pop(name, None)
        if other is not None:
            self._odd[other] = None
            self._notice(
                f"'{shown(other)}' is no name for SwanLab, and '{shown(name)}' is logged as well: from now on its "
                "values are in the journal only."
            )

    def _mend(self, name: str) -> str | None:
        mended = fitting(name)
        if mended is None:
            self.tell(name, f"'{shown(name)}' is no name for SwanLab: its values are in the journal only.")
        elif mended in self._good or mended in self._mended:
            self.tell(
                name,
                f"'{shown(name)}' is no name for SwanLab, and '{shown(mended)}' is logged as well: its values are in "
                "the journal only.",
            )
            mended = None
        else:
            self._mended[mended] = name
            self.tell(name, f"'{shown(name)}' is no name for SwanLab: it stands there as '{shown(mended)}'.")
        return mended


def fitting(name: str) -> str | None:
    """A name as SwanLab takes it: trimmed as it trims itself, control characters as their symbols, and a mark of its
    own at the end of what is too long. None where nothing is left, and for names that are taken.
    """
    mended = name.strip(_EDGES)
    if not mended.isprintable():
        mended = one_line(mended)
    if not mended or mended == TABLE or mended.startswith(_SYSTEM):
        return None
    if len(mended) > NAME_CHARACTERS:
        mark = f"~{sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
        mended = mended[: NAME_CHARACTERS - len(mark)] + mark
    return mended


def shown(name: str) -> str:
    """A name in a sentence: short, on one line, and never as one that stands for it: its controls are escaped."""
    text = name if name.isprintable() else repr(name)[1:-1]
    return f"{text[:40]}...{text[-20:]}" if len(text) > 63 else text


def fit_time(time_ns: int) -> int:
    """A time as SwanLab's records can hold it."""
    return min(max(time_ns, 0), LATEST_NS)


def fit_config(values: Mapping[Any, Any]) -> dict[str, Any]:
    """A configuration as JSON can hold it, each part for itself."""
    fitted: dict[str, Any] = _fit(values, 0)
    return fitted


def _fit(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() < 64 else _large(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"  # as SwanLab writes them
    if isinstance(value, Mapping) and depth < CONFIG_DEPTH:
        return {_text(str(key)): _fit(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)) and depth < CONFIG_DEPTH:
        return [_fit(item, depth + 1) for item in value]
    try:
        return _text(str(value))
    except Exception:  # of an object that cannot be described
        return type(value).__name__


def _large(value: int) -> float | str:
    try:
        return float(value)
    except OverflowError:
        return f"an integer of {value.bit_length()} bits"


def _text(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()
    if len(text) > CONFIG_CHARACTERS:
        return f"{text[:CONFIG_CHARACTERS]} [... {len(text) - CONFIG_CHARACTERS} more characters]"
    return text
