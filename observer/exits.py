"""How this process ends: an exception, Ctrl-C, ``sys.exit`` with a code, or quietly."""

from __future__ import annotations

import atexit
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from swanlab_ray.actors.protocol import State

TRACEBACK_LINES = 12


def describe(error: BaseException) -> tuple[State, str]:
    """State and text for an exception that ended something: its name, message and the last lines of its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "aborted", "KeyboardInterrupt (Ctrl-C)"
    if isinstance(error, SystemExit):
        return "crashed" if error.code not in (None, 0, False) else "aborted", f"sys.exit({error.code!r})"
    headline = "".join(traceback.format_exception_only(error)).strip()
    trace = "".join(traceback.format_tb(error.__traceback__)).rstrip().splitlines()[-TRACEBACK_LINES:]
    return "crashed", "\n".join([headline, *trace])


class ExitWatch:
    """Calls ``at_exit(verdict)`` when the interpreter ends; the verdict is None if nothing spoke against success."""

    def __init__(self, at_exit: Callable[[tuple[State, str] | None], None]) -> None:
        self._at_exit = at_exit
        self._verdict: tuple[State, str] | None = None
        self._previous_hook = sys.excepthook
        self._previous_exit = sys.exit
        sys.excepthook = self._on_exception
        sys.exit = self._on_sys_exit  # type: ignore[assignment]
        _watching.append(self)
        atexit.register(self._run)

    def stop(self) -> None:
        """Watch no longer."""
        if self in _watching:
            _watching.remove(self)
        atexit.unregister(self._run)
        if sys.excepthook == self._on_exception:
            sys.excepthook = self._previous_hook
        if sys.exit == self._on_sys_exit:
            sys.exit = self._previous_exit

    def _on_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._verdict = describe(error.with_traceback(trace))
        self._previous_hook(kind, error, trace)

    def _on_sys_exit(self, code: Any = None) -> None:
        if code not in (None, 0, False):
            self._verdict = ("crashed", f"sys.exit({code!r})")
        self._previous_exit(code)

    def _run(self) -> None:
        self._at_exit(self._verdict)


_watching: list[ExitWatch] = []


def run_exit_handler_first() -> None:
    """Let our exit handler run before those that were registered since; the last one registered runs first."""
    for watch in _watching:
        atexit.unregister(watch._run)
        atexit.register(watch._run)
