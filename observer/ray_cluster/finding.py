"""Where Ray comes from: one that is initialised, a cluster that runs, or one the ranks of a single node start."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swanlab_ray.actors.wire.messages import NAMESPACE
from swanlab_ray.observer.ray_cluster import directories, patches, sharing
from swanlab_ray.observer.ray_cluster.addresses import NoCluster as NoCluster
from swanlab_ray.observer.ray_cluster.addresses import answers as _answers
from swanlab_ray.observer.ray_cluster.addresses import names_no_cluster, noted_on_this_machine, speech
from swanlab_ray.observer.ray_cluster.guards import (
    occupy_standard_descriptors,
    process_unchanged,
    set_environment,
)
from swanlab_ray.observer.ray_cluster.private import (
    Deadline,
    described,
    leave_private,
    never,
    start_private,
    wait_started,
)
from swanlab_ray.observer.script.ending import run_exit_handler_first
from swanlab_ray.observer.script.notices import warn_once

SCRIPTS_INIT_S = 60.0
"""How long a ``ray.init`` of the script is waited for."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray cluster this process is connected to."""

    address: str
    ours: bool
    """This process initialised Ray, so it also shuts it down."""
    connection: int
    """Which of this process's connections to Ray it is; see sharing."""
    directory: Path | None = None
    """Where a cluster lies that the ranks started for themselves."""

    @property
    def life_lock(self) -> str | None:
        """The lock file of such a cluster."""
        return str(self.directory / "alive") if self.directory else None


def attach(run_id: str, nodes: int, ranks: int = 1, dashboard: bool = True, deadline: Deadline = never) -> Cluster:
    """Connect this rank to Ray: the initialised one, ``RAY_ADDRESS``, a running cluster, or a private one.

    Args:
        run_id: names the private cluster, which is started where there is none.
        nodes: machines of the job; a private cluster serves one machine only.
        ranks: processes of the job; a cluster that one of them has inside of it serves one only.
        dashboard: whether a private cluster has one.
        deadline: says until when (monotonic) it may take.

    Raises:
        NoCluster: none can be reached.
    """
    set_environment()
    occupy_standard_descriptors()
    if importlib.util.find_spec("ray") is None:
        raise NoCluster("Ray is not installed: pip install 'ray>=2.50'.")
    scripts = _scripts_own(ranks)
    if scripts is not None:
        return scripts
    address = running_address()
    if address:
        wrong = _speaks_no_ray(address)
        if wrong is None:
            return _join(address, ranks=ranks, share=True)
        if nodes > 1:
            raise NoCluster(f"{wrong}: set RAY_ADDRESS to the HOST:6379 of this job's Ray cluster.")
        warn_once("no ray there", f"{wrong}; this run gets a cluster of its own on this machine.")
    if nodes > 1:
        given = os.environ.get("RAY_ADDRESS")
        wrong = given and names_no_cluster(given)
        reason = f" RAY_ADDRESS={given!r} names none: {wrong}." if wrong else ""
        raise NoCluster(
            f"No Ray cluster is reachable and the job runs on {nodes} machines: start one (ray start --head, and "
            f"ray start --address=HEAD:6379 on the others) and set RAY_ADDRESS=HEAD:6379 on every rank.{reason}"
        )
    directory = start_private(run_id, dashboard)
    wait_started(directory, deadline)
    cluster = _join_private(directory, ranks, share=True)
    if cluster.directory is None:  # the script's, initialised meanwhile
        leave_private(directory)
    return cluster


def _scripts_own(ranks: int) -> Cluster | None:
    """The Ray that the script has initialised, if it has.

    Raises:
        NoCluster: the other ranks cannot report to it.
    """
    ray: Any = sys.modules.get("ray")
    initialised = getattr(ray, "is_initialized", None)  # it may be half imported
    if initialised is None or not initialised():
        return None
    with sharing.using_ray():
        if ranks > 1 and patches.is_inside_alone():
            raise NoCluster(
                f"This rank's script has started a Ray cluster inside its process, where the other {ranks - 1} do not "
                "report: give ray.init the address of a cluster that all ranks share."
            )
        address = ray.get_runtime_context().gcs_address
        sharing.share(ray)
        return Cluster(address, ours=False, connection=sharing.claim(ours=False))


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


def attach_watcher(run_id: str | None) -> Cluster:
    """Connect this process to the cluster where a run, or any run, reports; never starts one.

    Raises:
        NoCluster: there is none, or several private ones and no run id to tell which.
    """
    set_environment()
    occupy_standard_descriptors()
    private = {}
    for name, directory in directories.published():
        with suppress(OSError, ValueError, KeyError):
            if _answers(described(directory)["address"]):
                private[name] = directory
    if run_id is None:
        address = running_address()
        if address is None and not private:
            raise NoCluster("No run is in progress on this machine, and RAY_ADDRESS names no cluster to look at.")
        if address is None and len(private) > 1:
            raise NoCluster(f"Several runs are in progress, name one: {', '.join(sorted(private))}.")
        return _join(address) if address else _join_private(next(iter(private.values())))
    if run_id in private:
        return _join_private(private[run_id])
    address = running_address()
    if address is None:
        known = f" (in progress: {', '.join(sorted(private))})" if private else ""
        raise NoCluster(f"No run '{run_id}' is in progress on this machine{known}, and RAY_ADDRESS is not set.")
    return _join(address)


def _join_private(directory: Path, ranks: int = 1, share: bool = False) -> Cluster:
    try:
        found = described(directory)
        return _join(str(found["address"]), found["environment"], directory, ranks, share)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, NoCluster):
            raise
        raise NoCluster(f"The Ray cluster of this run has just ended: {error}") from error


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


def detach(cluster: Cluster, over: bool = False) -> None:
    """Leave Ray, if this process joined it for the observer only, and let a private cluster end, soon where the run is
    over."""
    try:
        with sharing.using_ray(cluster.connection):
            if cluster.ours:
                sharing.leave(always=True)
    except sharing.Taken:
        pass  # the script has taken it from us
    if cluster.directory is not None:
        leave_private(cluster.directory, over)


def reachable(cluster: Cluster) -> bool:
    """Whether the cluster's GCS answers. Ray's own calls would wait for it without end."""
    return _answers(cluster.address)


def _join(
    address: str,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    ranks: int = 1,
    share: bool = False,
) -> Cluster:
    """Initialise Ray for the observer, unless the script has done so itself by now.

    Args:
        environment: what Ray must find there, best when it is imported.
        directory: of a private cluster.
        ranks: processes of the job.
        share: the script may want to use Ray itself.

    Raises:
        NoCluster: the cluster refused.
    """
    if share:
        _await_scripts_init()
    with sharing.using_ray():
        scripts = _scripts_own(ranks) if share else None
        if scripts is not None:
            return scripts
        os.environ.update(environment or {})
        with process_unchanged():
            import ray

            run_exit_handler_first()  # Ray's own exit handler, registered by its import, would cut the connection
    if share:
        _await_scripts_init()  # it may have begun while Ray was being imported
    with sharing.using_ray():
        scripts = _scripts_own(ranks) if share else None
        if scripts is not None:
            return scripts
        sharing.hush()
        try:
            with process_unchanged(), patches.joining():
                ray.init(
                    address=address,
                    namespace=NAMESPACE,
                    log_to_driver=False,
                    configure_logging=False,
                    logging_level="CRITICAL",
                    job_config=patches.job_config(f"swanlab-ray rank {os.environ.get('RANK', '0')}"),
                )
        except Exception as error:
            sharing.speak()
            raise NoCluster(f"The Ray cluster at '{address}' could not be joined: {_brief(error)}") from error
        return Cluster(address, ours=True, connection=sharing.claim(ours=share), directory=directory)


def _await_scripts_init() -> None:
    """Let the script's calls come first from now on, and those end that have begun.

    Raises:
        NoCluster: it does not end.
    """
    ray = sys.modules.get("ray")
    if not hasattr(ray, "init") or not hasattr(ray, "shutdown"):
        return  # not imported, or half
    sharing.share(ray)
    deadline = time.monotonic() + SCRIPTS_INIT_S
    while sharing.is_under_way(ray):
        if time.monotonic() >= deadline:
            raise NoCluster(f"The script's own ray.init has not come back for {SCRIPTS_INIT_S:.0f} s.")
        time.sleep(0.05)


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
