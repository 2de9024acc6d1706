"""The Ray cluster that is meant, if one is: whether it can be joined, and what is installed on its head."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from swanlab_ray.observer.doctor.finding import Finding, phrase
from swanlab_ray.observer.doctor.versions import installed
from swanlab_ray.observer.ray_cluster.finding import NoCluster, OtherVersion, join, leave, meant

ANSWER_S = 120.0
"""How long a worker may take to start there."""


def examine_cluster() -> Iterator[Finding]:
    """Leaves no connection behind."""
    try:
        address = meant()
    except NoCluster as error:
        yield Finding("wrong", "Ray", phrase(error))
        return
    given = os.environ.get("RAY_ADDRESS")
    if address is None and given:
        told = f"RAY_ADDRESS={given!r} is no cluster that ranks can report to, so each run has one of its own"
        yield Finding("note", "Ray", told)
        return
    if address is None:
        yield Finding("ok", "Ray", "no cluster is named or runs here, so each run has one of its own while it lasts")
        return
    try:
        there = _on_head(address, installed_there)
    except OtherVersion as error:
        yield Finding("wrong", "Ray", f"{phrase(error)}: run both sides with the same Ray and Python")
        return
    except NoCluster as error:
        yield Finding("wrong", "Ray", f"{phrase(error)}: is this machine a node of it? `ray start` makes it one")
        return
    except Exception as error:
        told = f"the cluster at {address} ran nothing on its head ({type(error).__name__}): look at `ray status`"
        yield Finding("wrong", "Ray", told)
        return
    yield Finding("ok", "Ray", f"the cluster at {address} works")
    yield compared(address, installed(), there)


def compared(address: str, here: dict[str, str], there: dict[str, str]) -> Finding:
    """What is installed here, and what there, on the head at this address."""
    if "swanlab-ray" not in there:
        return Finding(
            "wrong", "head", f"swanlab-ray is not installed on {address}, where the writer runs: pip install it"
        )
    other = [
        f"{name} {there.get(name, 'missing')} (here {here.get(name, 'missing')})"
        for name in ("swanlab-ray", "swanlab")
        if there.get(name) != here.get(name)
    ]
    if other:
        return Finding("wrong", "head", f"it has {', '.join(other)}: install the same version there")
    return Finding("ok", "head", f"swanlab-ray {there['swanlab-ray']} is there, as here")


def _on_head(address: str, function: Callable[[], Any]) -> Any:
    import ray

    join(address, "swanlab-ray doctor")
    try:
        remote = ray.remote(function).options(num_cpus=0, resources={"node:__internal_head__": 0.001})
        return ray.get(remote.remote(), timeout=ANSWER_S)
    finally:
        leave()


def _by_value() -> Callable[[], dict[str, str]]:
    """What asks for the versions there: sent as code, since this package may not be there."""

    def look() -> dict[str, str]:
        from importlib.metadata import PackageNotFoundError, version

        found = {}
        for name in ("swanlab-ray", "swanlab"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        return found

    look.__module__ = "__main__"
    return look


installed_there = _by_value()
