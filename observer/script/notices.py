"""What the observer tells its user: one logger, each sentence once. Nothing here raises or blocks."""

from __future__ import annotations

import logging
import select
import sys
from collections import deque
from contextlib import suppress

from swanlab_ray.actors.wire.secret_shapes import masked
from swanlab_ray.actors.wire.text import harmless

UNSAID = 100
"""Pieces that wait for a terminal that takes nothing; the oldest go first."""
PIECE = 1_000
"""Characters that are written at once: a pipe that takes anything takes 4,096 bytes without making us wait."""


class _Logger(logging.Logger):
    """A logger whose handlers and filters, which may be anybody's, harm nobody, and whose messages hold no secrets."""

    def handle(self, record: logging.LogRecord) -> None:
        with suppress(Exception):
            # A message may quote an error, a setting or an address.
            record.msg, record.args = harmless(masked(record.getMessage())), ()
            super().handle(record)


class _Terminal(logging.Handler):
    """Prints to stderr as long as the application has not configured logging itself, or after :func:`speak_up`.

    Standard error may be closed, a pipe without a reader, a full disk, or not UTF-8; that costs the line and no more.
    """

    def __init__(self) -> None:
        super().__init__()
        self._unsaid: deque[str] = deque(maxlen=UNSAID)

    def emit(self, record: logging.LogRecord) -> None:
        if logger.propagate and logging.getLogger().handlers:
            return
        for line in f"swanlab-ray: {record.getMessage()}\n".splitlines(keepends=True):
            self._unsaid += (line[start : start + PIECE] for start in range(0, len(line), PIECE))
        while self._unsaid and _takes_more():
            _print(self._unsaid.popleft())


def _takes_more() -> bool:
    """Whether a line can be written now: a terminal that was stopped (Ctrl-S) or a pager would make us wait."""
    try:
        poll = select.poll()
        poll.register(sys.stderr.fileno(), select.POLLOUT)
        return bool(poll.poll(0))
    except Exception:  # a notebook's, which has no descriptor, or none at all
        return True


def _print(line: str) -> None:
    try:
        sys.stderr.write(line)
    except UnicodeError:
        with suppress(Exception):
            sys.stderr.write(line.encode("ascii", "backslashreplace").decode())
    except Exception:
        pass  # there is nobody to tell
    with suppress(Exception):
        sys.stderr.flush()


logger = logging.getLogger("swanlab_ray")
logger.__class__ = _Logger  # it may have been made by the application's own configuration of logging
logger.setLevel(logging.INFO)
logger.addHandler(_Terminal())

_said: set[str] = set()


def warn_once(key: str, sentence: str, most: int = 1_000) -> None:
    """Warn, unless something was said under this key in this run, or under so many keys that it would never end."""
    if key not in _said and len(_said) < most:
        _said.add(key)
        logger.warning("%s", sentence)


def say_again() -> None:
    """Another run begins: it may have the same troubles as the one before."""
    _said.clear()


def speak_up() -> None:
    """Print everything, where the application's logging would keep what is below a warning to itself."""
    logger.propagate = False
    logger.filters.clear()
