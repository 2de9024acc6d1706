"""Methods of one object with something around them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Wrapped:
    """Takes a method's place as an attribute of its object, and calls ``around(method, *args, **kwargs)`` instead.

    A copy of the object, by :func:`copy.deepcopy` or pickle, has its own method with nothing around it: a function
    would go on working on the original.
    """

    def __init__(self, method: Callable[..., Any], around: Callable[..., Any]) -> None:
        functools.update_wrapper(self, method)
        self.method = method
        self._around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self.method, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Wrapped, (self.method, _bare)


def _bare(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a copy has around its own method, which was copied together with its object."""
    return method(*args, **kwargs)
