"""The public names, each with its signature: to change one is to change what people have written."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from swanlab_ray import observer

SIGNATURES = Path(__file__).with_name("exported_members.txt")
HOMES = {
    "swanlab_ray.observer": observer.__all__,
    "swanlab_ray.observer.completions": ["attach"],
    "swanlab_ray.observer.profiling": [
        "DEFAULT_PROFILING_CONFIG",
        "ProfilingConfig",
        "swanlab_profile",
        "swanlab_profiling_context",
        "swanlab_profiling_context_advanced",
    ],
    "swanlab_ray.observer.tracker": ["ObserverTracker"],
}


def described() -> str:
    """Each name as ``module.name(signature)``, and the methods of :class:`Observer` and the settings' fields."""
    lines = []
    for module, names in HOMES.items():
        for name in sorted(names):
            member = getattr(importlib.import_module(module), name)
            lines.append(f"{module}.{name}{signature(member)}")
    for name, member in inspect.getmembers(observer.Observer):
        if not name.startswith("_"):
            lines.append(f"Observer.{name}{signature(member)}")
    lines += [f"ObserverSettings.{name} = {field.default!r}" for name, field in SETTINGS.items()]
    return "\n".join(lines) + "\n"


SETTINGS = observer.ObserverSettings.model_fields


def signature(member: object) -> str:
    if isinstance(member, type) and issubclass(member, Exception | observer.ObserverSettings):
        return ""
    return str(inspect.signature(member)) if callable(member) else ""


def test_public_names_and_their_signatures() -> None:
    assert described() == SIGNATURES.read_text(), "a public name has changed: is that in the changelog?"


def test_every_public_name_is_documented() -> None:
    for module, names in HOMES.items():
        for name in names:
            member = getattr(importlib.import_module(module), name)
            assert not callable(member) or inspect.getdoc(member), name
    for name, member in inspect.getmembers(observer.Observer):
        assert name.startswith("_") or inspect.getdoc(member), name


def test_no_other_name_is_public() -> None:
    with pytest.raises(AttributeError):
        getattr(observer, "Nobody")  # noqa: B009 - mypy knows that it is not there
    assert set(observer.__all__) <= set(dir(observer))
