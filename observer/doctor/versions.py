"""Which versions work together here."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from swanlab_ray.observer.doctor.finding import Finding

TESTED = {
    "ray": ("2.60.0", "2.60.0"),
    "swanlab": ("0.10.3", "0.10.3"),
    "torch": ("2.13.0", "2.13.0"),
    "transformers": ("4.57.6", "5.24.0"),
    "accelerate": ("1.13.0", "1.15.0"),
    "trl": ("0.19.1", "1.16.0"),
    "axolotl": ("0.19.0", "0.19.0"),
}
"""Oldest and newest with which the tests are run."""


def installed() -> dict[str, str]:
    """Versions of what takes part, as far as it is there."""
    found = {"python": platform.python_version()}
    for name in ("swanlab-ray", *TESTED):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def examine_versions() -> Iterator[Finding]:
    """What is too old, too new, or missing."""
    here = installed()
    yield Finding("ok", "versions", ", ".join(f"{name} {number}" for name, number in here.items()))
    yield from _against_requirements()
    for name, (oldest, newest) in TESTED.items():
        if name not in here:
            continue
        try:
            number = Version(here[name]).public  # without what it was built with, such as +cpu
            known = Version(oldest) <= Version(number) <= Version(newest)
        except InvalidVersion:  # of somebody's own
            number, known = here[name], False
        if not known:
            tested = oldest if oldest == newest else f"{oldest} to {newest}"
            yield Finding("note", name, f"{number} is not among what is tested ({tested}); it may work as well")


def _against_requirements() -> Iterator[Finding]:
    try:
        required = [Requirement(text) for text in requires("swanlab-ray") or []]
    except PackageNotFoundError:
        yield Finding("wrong", "swanlab-ray", "it is imported from a directory and not installed: pip install it")
        return
    for one in required:
        optional = one.marker is not None and not one.marker.evaluate({"extra": ""})
        if optional and not one.specifier:
            continue
        try:
            number = version(one.name)
        except PackageNotFoundError:
            if not optional:
                yield Finding("wrong", one.name, f"it is not installed: pip install '{one.name}{one.specifier}'")
            continue
        if not one.specifier.contains(number, prereleases=True):
            told = f"{number} does not work, {one.specifier} does: pip install '{one.name}{one.specifier}'"
            yield Finding("wrong", one.name, told)
