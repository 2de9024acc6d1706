"""Which Ray cluster is meant, and joining it: for the agent of a machine, and for whoever looks at runs."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from swanlab_ray.actors.wire.messages import NAMESPACE
from swanlab_ray.observer.ray_cluster import directories, patches
from swanlab_ray.observer.ray_cluster.addresses import NoCluster as NoCluster
from swanlab_ray.observer.ray_cluster.addresses import answers as _answers
from swanlab_ray.observer.ray_cluster.addresses import names_no_cluster, noted_on_this_machine, speech
from swanlab_ray.observer.script.descriptors import occupy_standard_descriptors
from swanlab_ray.observer.script.notices import warn_once

WATCHER = "swanlab-ray watcher"


class OtherVersion(NoCluster):
    """It is of another version of Ray, or of Python."""


def meant() -> str | None:
    """Address of the cluster that this job is to report to; None: it is to start one of its own.

    Raises:
        NoCluster: none can be reached.
    """
    if importlib.util.find_spec("ray") is None:
        raise NoCluster("Ray is not installed: pip install 'ray>=2.50'.")
    address = running_address()
    wrong = address and _speaks_no_ray(address)
    if wrong:
        warn_once("no ray there", f"{wrong}; this run gets a cluster of its own.")
        return None
    return address


def _speaks_no_ray(address: str) -> str | None:
    """What is wrong with an address that answers; None where it is a Ray cluster's.

    Raises:
        NoCluster: nothing is said there, which may change: the machine is busy, or somebody else listens.
    """
    spoken = speech(address)
    if spoken == "gRPC":
        return None
    given = os.environ.get("RAY_ADDRESS", "")
    named = f"RAY_ADDRESS={given!r}" if given else f"{address!r}, noted on this machine as its Ray cluster,"
    if spoken == "nothing":
        raise NoCluster(f"{named} is listened to, but nothing is answered there: check host and port.")
    return f"{named} is none (something else answers there)"


def described(directory: Path) -> dict[str, Any]:
    """Address, dashboard and environment of the cluster of a run, once its agent has joined or started it."""
    found: dict[str, Any] = json.loads((directory / "cluster").read_text())
    return found


def join_watcher(run_id: str | None) -> None:
    """Connect this process to the cluster where a run, or any run, reports; never starts one.

    Raises:
        NoCluster: there is none, or several private ones and no run id to tell which.
    """
    occupy_standard_descriptors()
    found: dict[str, dict[str, Any]] = {}
    for name, directory in directories.published():
        with suppress(OSError, ValueError, KeyError):
            cluster = described(directory)
            if _answers(cluster["address"]):
                found[name] = cluster
    if run_id in found:
        return _join_described(found[run_id])
    address = running_address()
    if address is not None:
        return join(address, WATCHER)
    names = ", ".join(sorted(found))
    if run_id is not None:
        known = f" (in progress: {names})" if found else ""
        raise NoCluster(f"No run '{run_id}' is in progress on this machine{known}, and RAY_ADDRESS is not set.")
    if not found:
        raise NoCluster("No run is in progress on this machine, and RAY_ADDRESS names no cluster to look at.")
    if len({cluster["address"] for cluster in found.values()}) > 1:
        raise NoCluster(f"Several runs are in progress, name one: {names}.")
    return _join_described(next(iter(found.values())))


def _join_described(cluster: dict[str, Any]) -> None:
    join(str(cluster["address"]), WATCHER, cluster["environment"])


def running_address() -> str | None:
    """Address of the cluster that is meant: ``RAY_ADDRESS``, else the one ``ray start`` noted on this machine.

    Raises:
        NoCluster: ``RAY_ADDRESS`` is set but nobody answers there.
    """
    given = os.environ.get("RAY_ADDRESS", "")
    no_cluster = names_no_cluster(given)
    if no_cluster:
        warn_once(
            "no cluster named",
            f"RAY_ADDRESS={given!r} names no cluster to report to ({no_cluster}), so it is not used.",
        )
        return None
    if given and given != "auto":
        if "://" in given:
            raise NoCluster(f"RAY_ADDRESS='{given}' is a Ray Client address; ranks need the cluster's HOST:6379.")
        if not _answers(given):
            raise NoCluster(f"The Ray cluster at RAY_ADDRESS='{given}' cannot be reached: check host and port.")
        return given
    # Other jobs' private clusters are never noted here, so they are never joined by accident.
    address = noted_on_this_machine(anybody=bool(given))
    if address is None and given:
        raise NoCluster("RAY_ADDRESS='auto', but no Ray cluster runs on this machine: ray start --head.")
    return address


def join(address: str, name: str, environment: Mapping[str, str] | None = None) -> None:
    """Initialise Ray in this process, which is ours.

    Args:
        address: of the cluster.
        name: of this process's job in Ray's dashboard.
        environment: what Ray must find there, best when it is imported.

    Raises:
        OtherVersion: this process cannot join it.
        NoCluster: the cluster refused.
    """
    for variable, value in patches.DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    os.environ.update(environment or {})
    import ray

    try:
        with patches.joining():
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                configure_logging=False,
                logging_level="CRITICAL",
                job_config=patches.job_config(name),
            )
    except Exception as error:
        kind = OtherVersion if "mismatch" in str(error) else NoCluster
        raise kind(f"The Ray cluster at '{address}' could not be joined: {_brief(error)}") from error


def leave() -> None:
    """Leave it."""
    import ray

    ray.shutdown()


def _brief(error: BaseException) -> str:
    """In one line; all of it where Ray names two versions, one of each side, in lines of their own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, patches.RayletGone):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    shown = " ".join(lines[:8])[:300] if "mismatch" in text else "".join(lines[:1])[:200]
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__
