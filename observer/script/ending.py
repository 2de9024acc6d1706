"""How this process ends: an exception, Ctrl-C, ``sys.exit`` with a code, or quietly."""

from __future__ import annotations

import atexit
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from swanlab_ray.actors.wire.events import State
from swanlab_ray.actors.wire.secret_shapes import masked

TRACEBACK_FRAMES = 12
LONGEST_HEADLINE = 4_000
"""Characters of an exception's name and message."""


def describe(error: BaseException) -> tuple[State, str]:
    """State and text for an exception that ended something: its name, its message and where it was raised.

    No lines of code: they may hold a secret, and so may a message, which is masked.
    """
    if isinstance(error, KeyboardInterrupt):
        return "aborted", "KeyboardInterrupt (Ctrl-C)"
    if isinstance(error, SystemExit):
        return "crashed" if error.code not in (None, 0, False) else "aborted", _exit_text(error.code)
    return "crashed", "\n".join([headline(error), *_places(error.__traceback__)])


def headline(error: BaseException) -> str:
    """Name and message of an exception, without secrets; for sentences."""
    try:
        lines = traceback.format_exception_only(error)
    except Exception:  # one that is not made as exceptions are
        return str(type.__getattribute__(type(error), "__name__"))
    if isinstance(error, SyntaxError):  # what comes before its last line is code
        lines = [lines[-1].rstrip(), f" ({error.filename}:{error.lineno})"]
    return masked("".join(lines)[: 2 * LONGEST_HEADLINE].strip())[:LONGEST_HEADLINE]


def _places(trace: TracebackType | None) -> list[str]:
    frames = [
        f"  {frame.f_code.co_filename}:{line} in {frame.f_code.co_qualname}" for frame, line in traceback.walk_tb(trace)
    ]
    return frames[-TRACEBACK_FRAMES:]


def _exit_text(code: Any) -> str:
    """``sys.exit`` takes a number, or a message."""
    try:
        return f"sys.exit({masked(repr(code)[:LONGEST_HEADLINE])})"
    except Exception:
        return f"sys.exit({type(code).__name__})"


class _Exit(SystemExit):
    """What ``sys.exit()`` raises while it is watched; unlike its base it can be referred to weakly."""


class ExitWatch:
    """Calls ``at_exit(verdict)`` when the interpreter ends; the verdict is None if nothing spoke against success."""

    def __init__(self, at_exit: Callable[[tuple[State, str] | None], None]) -> None:
        self._at_exit = at_exit
        self._verdict: tuple[State, str] | None = None
        self._previous_hook = sys.excepthook
        self._previous_exit = sys.exit
        sys.excepthook = self._on_exception
        sys.exit = self._on_sys_exit  # type: ignore[assignment]
        atexit.register(self._run)

    def stop(self) -> None:
        """Watch no longer."""
        atexit.unregister(self._run)
        if sys.excepthook == self._on_exception:
            sys.excepthook = self._previous_hook
        if sys.exit == self._on_sys_exit:
            sys.exit = self._previous_exit

    def _on_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._verdict = describe(error.with_traceback(trace))
        self._previous_hook(kind, error, trace)

    def _on_sys_exit(self, code: Any = None) -> None:
        if code in (None, 0, False) or threading.current_thread() is not threading.main_thread():
            self._previous_exit(code)  # a thread ends by it, the process does not
        with suppress(SystemExit):
            self._previous_exit(code)
        leaving = _Exit(code)
        verdict: tuple[State, str] = ("crashed", _exit_text(code))
        self._leaving = weakref.ref(leaving, lambda reference: self._settle(verdict))
        try:
            raise leaving
        finally:
            del leaving  # a frame that refers to it would keep it alive

    def _settle(self, verdict: tuple[State, str]) -> None:
        """The exception of sys.exit() is gone. Where it has ended the interpreter no code of Python is running below
        this; where somebody caught it the program goes on, and it says nothing."""
        if sys._getframe(1).f_back is None:
            self._verdict = verdict

    def _run(self) -> None:
        self._at_exit(self._verdict)
