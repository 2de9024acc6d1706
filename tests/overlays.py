"""Other versions of libraries, which are put in front of the installed ones: tests/oldest.txt and tests/newest.txt."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def path_with(overlay: str) -> str:
    """``PYTHONPATH`` of a process that has these versions. Skips the test where nobody has installed them."""
    directory = ROOT / "build" / overlay
    if not directory.is_dir():
        pytest.skip(f"build/{overlay} is not there: `make build/{overlay}` installs it")
    return os.pathsep.join(filter(None, [str(directory), str(ROOT), os.environ.get("PYTHONPATH")]))
