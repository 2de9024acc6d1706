"""Run ids, titles and paths, judged in one place: each becomes a file's name, a part of an address, or a line on a
terminal."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

RUN_ID_RULE = (
    "a run id is 1 to 64 characters (200 bytes), begins with a letter, a digit or _, and has no spaces and none of "
    '< > : " / \\ | ? * # %'
)
RUN_ID_CHARACTERS = 64
_RUN_ID = re.compile(r'\w[^<>:"/\\|?*#%\s]{0,63}')
_RUN_ID_BYTES = 200
"""A file's name has 255 at most, and some are the run id with an ending."""
_ENDING_CHARACTERS = 8
"""Kept free in an id that is made from a launcher's words, for the number of a second run."""


def is_run_id(text: str) -> bool:
    """Whether a text can be a run id: the name of a directory of ours that leads nowhere else."""
    return bool(_RUN_ID.fullmatch(text) and text.isprintable() and len(text.encode()) <= _RUN_ID_BYTES)


def slug(text: str) -> str:
    """What of a launcher's word can stand in a run id; perhaps nothing."""
    return re.sub(r"[^0-9A-Za-z_.-]+|[.]{2,}", "-", text).strip("-.")


def run_id_of(words: str) -> str:
    """A run id from a launcher's words, the same for the same words. Long ones are cut, and told apart by a hash."""
    name = slug(words)
    if len(name) <= RUN_ID_CHARACTERS - _ENDING_CHARACTERS:
        return name or "run"
    unique = hashlib.sha256(words.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{name[: RUN_ID_CHARACTERS - _ENDING_CHARACTERS - 9]}-{unique}"


def unprintable(text: str) -> str | None:
    """The first character that is neither text nor space: one that steers a terminal, or half of one."""
    return next((one for one in text if not one.isprintable() and not one.isspace()), None)


def absolute(path: Path) -> Path:
    """A path from the root; as it is where the working directory is gone.

    Raises:
        ValueError: it cannot be the path of anything. The message says why.
    """
    given = str(path)
    if "\0" in given or not _is_unicode(given):
        raise ValueError(f"{given!r} is not readable text: write the path in UTF-8.")
    try:
        path = path.expanduser()
    except RuntimeError:
        raise ValueError(f"{given!r} begins with a home directory that is not known here: write it out.") from None
    try:
        return Path(os.path.abspath(path))
    except FileNotFoundError:  # somebody has removed the working directory
        return path


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
