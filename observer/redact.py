"""Configurations as plain values, without the secrets in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SECRET_NAME = re.compile(
    r"(api_?key|private_key|secret|passw(or)?d|webhook|credential|(hub|auth|access|hf|api)_token|^token$)", re.I
)
_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
"""A user name and password in an address."""


def plain(value: Any, name: str = "") -> Any:
    """A copy made of plain types, with secrets masked: by their names, and in addresses."""
    if value and not isinstance(value, bool) and _SECRET_NAME.search(name):
        return "***"
    if isinstance(value, Mapping):
        return {str(key): plain(item, str(key)) for key, item in value.items()}
    if isinstance(value, str):
        return _IN_URL.sub("***", value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return str(value)
