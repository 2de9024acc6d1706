"""The guard around everything that a training script calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Wrong(ValueError):
    """A call is wrong. The message is one sentence that says what to pass.

    Args:
        kind: of mistake; each kind is told once.
    """

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


class Guarded(Protocol):
    """What has methods that never raise."""

    settings: Any
    unobserved: bool
    """Nothing is recorded, and nothing told of what is wrong."""

    def excuse(self, key: str, sentence: str) -> None:
        """Count a call that went wrong, and tell of it once under this key."""


Owner = TypeVar("Owner", bound=Guarded)


def never_raises(
    otherwise: Result,
) -> Callable[[Callable[Concatenate[Owner, Arguments], Result]], Callable[Concatenate[Owner, Arguments], Result]]:
    """A method that returns ``otherwise`` where it would raise, and tells why; under ``strict=True`` it raises, unless
    nothing is observed."""

    def decorate(
        method: Callable[Concatenate[Owner, Arguments], Result],
    ) -> Callable[Concatenate[Owner, Arguments], Result]:
        @functools.wraps(method)
        def guarded(self: Owner, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                if self.settings.strict and not self.unobserved:
                    raise
                if isinstance(error, Wrong):
                    self.excuse(error.kind, str(error))
                else:
                    name = method.__name__.lstrip("_")
                    what = f"{type(error).__name__} {shown(str_of(error))}".rstrip()
                    self.excuse(f"{name} {type(error).__name__}", f"{name}() failed ({what}); the training goes on.")
                return otherwise

        return guarded

    return decorate


def records(
    method: Callable[Concatenate[Owner, Arguments], None],
) -> Callable[Concatenate[Owner, Arguments], None]:
    """A method that records something: it never raises, and where nothing is observed it does not look at its
    arguments: reading a value may take long."""
    guarded = never_raises(None)(method)

    @functools.wraps(method)
    def recording(self: Owner, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        if not self.unobserved:
            guarded(self, *args, **kwargs)

    return recording


def str_of(value: object) -> str:
    """The text of a value, whatever it is."""
    try:
        return str(value)
    except Exception:
        return f"<{type(value).__name__}>"


def shown(value: object) -> str:
    """A value as a message shows it: short, whatever it is."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."
