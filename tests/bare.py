"""Bare environments: the wheel with one of its extras, and nothing that this does not ask for."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from collections import defaultdict
from functools import cache
from importlib.metadata import Distribution, PathDistribution, distributions
from pathlib import Path

import pip
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS = "swanlab-ray"
ROOT = Path(__file__).parents[1]


class Bare:
    """A virtual environment with the wheel. What runs in it knows nothing of this checkout.

    Args:
        directory: where it is made.
        wheel: the wheel.
    """

    def __init__(self, directory: Path, wheel: Path) -> None:
        self._directory = directory
        self._wheel = wheel
        venv.create(directory, with_pip=False, symlinks=True)

    def link(self, extra: str) -> None:
        """Put in what an extra asks for, by links to what is installed here: that takes seconds and no network."""
        self._pip("--no-index", "--no-deps", str(self._wheel))
        (site,) = self._directory.glob("lib/python*/site-packages")
        wanted = self.needed(extra)
        for top, owners in _owners().items():
            ours = owners & wanted
            if ours == owners:
                (site / top).symlink_to(HERE / top)
            elif ours:  # a directory that other distributions have parts of
                for path in (path for name in ours for path in _files(name) if path.parts[0] == top):
                    (site / path).parent.mkdir(parents=True, exist_ok=True)
                    (site / path).symlink_to(HERE / path)

    def needed(self, extra: str) -> set[str]:
        """The distributions that the wheel asks for with an extra, and those that these ask for."""
        ours = _in_wheel(self._wheel)
        known = _here() | {OURS: ours}
        todo = [(ours, extra)]
        seen: set[tuple[str, str]] = set()
        while todo:
            package, its_extra = todo.pop()
            for requirement in map(Requirement, package.requires or []):
                if requirement.marker is not None and not requirement.marker.evaluate({"extra": its_extra}):
                    continue
                name = canonicalize_name(requirement.name)
                new = {(name, more) for more in ["", *requirement.extras]} - seen
                seen |= new
                todo += [(known[name], more) for _, more in new]
        return {name for name, _ in seen} - {OURS}

    def install(self, extra: str) -> None:
        """Install what an extra asks for, as people do. Takes minutes."""
        wheel = f"swanlab-ray[{extra}] @ {self._wheel.as_uri()}" if extra else str(self._wheel)
        self._pip("--constraint", str(ROOT / "constraints.txt"), wheel)

    def _pip(self, *arguments: str) -> None:
        python = str(self._directory / "bin" / "python")
        command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", *arguments]
        subprocess.run(command, check=True, timeout=3600)

    def run(self, *command: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment, such as ``python``."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        bin = self._directory / "bin"
        return subprocess.run(
            [str(bin / command[0]), *command[1:]],
            cwd=cwd,
            env=kept | {"PATH": f"{bin}{os.pathsep}{os.defpath}", "PYTHONUNBUFFERED": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
        )


HERE = Path(pip.__file__).parents[1]
"""Where this environment keeps what is installed."""


def _in_wheel(wheel: Path) -> Distribution:
    """What is packed in a wheel."""
    (metadata,) = (path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    return PathDistribution(metadata)


@cache
def _here() -> dict[str, Distribution]:
    return {canonicalize_name(one.name): one for one in distributions(path=[str(HERE)])}


@cache
def _files(name: str) -> list[Path]:
    """What a distribution has put into site-packages."""
    paths = [Path(str(file)) for file in _here()[name].files or []]
    return [path for path in paths if path.parts[0] != ".." and "__pycache__" not in path.parts]


@cache
def _owners() -> dict[str, set[str]]:
    """Which distributions have something in which file or directory of site-packages."""
    owners: dict[str, set[str]] = defaultdict(set)
    for name in _here():
        for path in _files(name):
            owners[path.parts[0]].add(name)
    return owners
