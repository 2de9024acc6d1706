"""What the observer tells its user: one logger, each sentence once."""

from __future__ import annotations

import logging
import sys

from swanlab_ray.observer.secret_shapes import masked

logger = logging.getLogger("swanlab_ray")


class _Terminal(logging.Handler):
    """Prints to stderr as long as the application has not configured logging itself, or after :func:`speak_up`."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logger.propagate or not logging.getLogger().handlers:
            sys.stderr.write(f"swanlab-ray: {record.getMessage()}\n")


def _without_secrets(record: logging.LogRecord) -> bool:
    """A message may quote an error, a setting or an address."""
    record.msg, record.args = masked(record.getMessage()), ()
    return True


logger.setLevel(logging.INFO)
logger.addFilter(_without_secrets)
logger.addHandler(_Terminal())

_said: set[str] = set()


def warn_once(key: str, sentence: str) -> None:
    """Warn, unless something was said under this key before. At most 1,000 keys, so that it stays bounded."""
    if key not in _said and len(_said) < 1000:
        _said.add(key)
        logger.warning(sentence)


def speak_up() -> None:
    """Print everything, where the application's logging would keep what is below a warning to itself."""
    logger.propagate = False
    logger.filters[:] = [_without_secrets]
