"""Which version of this package runs here."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def package_version() -> str:
    """Such as ``0.1.0``; empty where the package is not installed but only imported."""
    try:
        return version("swanlab-ray")
    except PackageNotFoundError:
        return ""
