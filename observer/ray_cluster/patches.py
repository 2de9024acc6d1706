"""What we change in Ray, and the only file that knows its private names. Each change has its reason.

A Ray that has no such name keeps its own behaviour: that costs an observation something, never a training.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from typing import Any

from swanlab_ray.observer.ray_cluster.addresses import socket_answers
from swanlab_ray.observer.ray_cluster.ports import free_ports

DRIVER_ENVIRONMENT = {
    # The C++ core exits a driver 60 s after the GCS is gone; a training must outlive its observer.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "1000000",
    # Batches travel inside the call, not through the object store: with a dead raylet that would exit the process.
    "RAY_max_direct_call_object_size": str(4 << 20),
    "RAY_task_rpc_inlined_bytes_limit": str(64 << 20),
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_DEDUP_LOGS": "0",
}
"""What an agent sets before it imports Ray."""
CLUSTER_ENVIRONMENT = {
    # Ray gives up a node that does not answer for 15 s. This one is alone: giving it up would end the observation.
    "RAY_health_check_failure_threshold": "100",
    # Ray ends a worker, and starts another, that has not imported everything within 60 s: on such a machine, for ever.
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_agent_register_timeout_ms": "600000",
    # Where memory is short Ray ends workers, and the only one here is the writer.
    "RAY_memory_monitor_refresh_ms": "0",
    # Ray's 15 leaves the writer a thirtieth of a core beside a training that takes all; it must answer all the same.
    "RAY_worker_niceness": "5",
    "RAY_prestart_worker_first_driver": "0",  # the writer's worker belongs to another job
}
"""What a cluster of the ranks' own is started with."""
UV_HOOK = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
"""Below `uv run` Ray packs the working directory and starts the writer through uv. Read when Ray is imported."""
RUNTIME_ENV_HOOK = "RAY_RUNTIME_ENV_HOOK"
"""Names a function that Ray calls in each process that joins."""
LISTEN_PORT = "dashboard_agent_listen_port"
AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", LISTEN_PORT)
POLL_S = 0.5
RAYLET_DEADLINE_S = 240.0
LOCAL_NODE_S = 20.0
"""How long a node of the cluster is looked for on this machine; Ray's own 60 s are most of what ``finish()`` has."""

PRIVATE = {
    "ray>=2.50": {
        "set what nothing else sets": (*DRIVER_ENVIRONMENT, *CLUSTER_ENVIRONMENT, UV_HOOK, RUNTIME_ENV_HOOK),
        "not take uv's environment for the writer's": (f"ray._private.ray_constants:{UV_HOOK}",),
        "not start what idles": (
            "ray._private.node:Node.start_monitor",
            "ray._private.node:Node.start_log_monitor",
            "ray._private.node:Node.start_api_server",
        ),
        "wait for a raylet on a busy machine": ("ray._private.services:get_node(gcs_address, node_id)",),
        "print nothing of the writer's in a training": ("ray._private.worker:listen_error_messages",),
        "know a cluster that only this process can use": (
            "ray._private.worker:_global_node",
            "ray._private.node:Node().head",
            "ray._private.state:jobs()",
            "IsDead",
            "DriverPid",
        ),
        "keep the writer on the cluster's head": ("node:__internal_head__",),
        "find the cluster that `ray start` has noted": ("ray_current_cluster",),
        "name a trainer by the class that Ray Train has derived from": ("RayTransformersTrainer",),
        "join from a directory that was removed": ("ray.job_config:JobConfig._runtime_env_has_working_dir",),
        "let a fork exit without Ray's threads": ("ray._private.worker:shutdown",),
        "tell two runs of one name apart, and know when Ray Train has given up": (
            "ray.train.v2._internal.execution.context:get_train_context()",
            "ray.train.v2._internal.execution.context:TrainRunContext().run_id",
            "ray.train.v2._internal.execution.context:TrainRunContext().run_config",
        ),
    },
    "ray>=2.54": {
        "give a raylet's agents their ports": (
            f"ray._private.services:start_raylet(session_dir, node_id, {', '.join(AGENT_PORTS)}, ...)",
            "ray._raylet:persist_port",
        ),
        "join no node that has ended": (
            "ray._private.services:get_node_to_connect_for_driver",
            "ray._private.services:GcsNodeInfo().raylet_socket_name",
            "ray._private.services:GcsNodeInfo().object_store_socket_name",
        ),
    },
    "ray>=2.55": {
        "not look a minute for a node of this machine": (
            "ray._private.services:get_node_to_connect_for_driver(timeout_seconds, ...)",
        ),
    },
}
"""What we do with which private names, by the versions that have them; ``tests/test_contracts.py`` looks for each."""


# Joining a cluster


class RayletGone(ConnectionError):
    """The node of this machine does not listen."""


@contextmanager
def joining() -> Iterator[None]:
    """Around the observer's ``ray.init``, which Ray would turn into more than a connection, or into the process's end.

    Where the raylet of this machine does not listen (it was killed, or its socket was cleaned away) Ray's core ends the
    process with code 1, so it is looked at before, where Ray has chosen the node. What befalls the writer Ray would
    print in the training, thousands of lines of it. It also turns on faulthandler, which needs a standard error with a
    descriptor.
    """
    from ray._private import ray_constants, services, worker

    with (
        _replaced(faulthandler, "enable", _enable_if_possible),
        _replaced(ray_constants, UV_HOOK, lambda hook: False),
        _replaced(worker, "listen_error_messages", lambda listen: lambda *_, **__: None),
        _replaced(services, "get_node_to_connect_for_driver", _choose_living),
    ):
        yield


@contextmanager
def _replaced(holder: Any, name: str, replacement: Callable[[Any], Any]) -> Iterator[None]:
    """Put ``replacement(original)`` in the place of a name; nothing where there is none."""
    original = getattr(holder, name, None)
    if original is None:
        yield
        return
    setattr(holder, name, replacement(original))
    try:
        yield
    finally:
        setattr(holder, name, original)


def _enable_if_possible(enable: Callable[..., Any]) -> Callable[..., None]:
    def enabled(*args: Any, **kwargs: Any) -> None:
        with suppress(Exception):  # standard error is a notebook's, a logger's, or none, and has no descriptor
            enable(*args, **kwargs)

    return enabled


def _choose_living(choose: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(*args: Any, **kwargs: Any) -> Any:
        if "timeout_seconds" in signature(choose).parameters:
            kwargs.setdefault("timeout_seconds", LOCAL_NODE_S)
        node = choose(*args, **kwargs)
        for name in ("raylet_socket_name", "object_store_socket_name"):
            path = node.get(name) if isinstance(node, dict) else getattr(node, name, None)  # a dict up to Ray 2.53
            if path and not socket_answers(path):
                raise RayletGone(f"Ray's node on this machine has ended or lost its socket {path}")
        return node

    return chosen


def job_config(name: str) -> Any:
    """What Ray is told of a rank's job."""
    import ray

    config = ray.job_config.JobConfig(metadata={"job_name": name})
    try:
        os.getcwd()
    except FileNotFoundError:  # somebody has removed it; Ray asks where it is, so that workers import from there
        config._runtime_env_has_working_dir = lambda: True
    return config


# What Ray is here


def is_inside_alone() -> bool:
    """Whether the cluster is one that this process has started, and no other process has joined yet.

    Each rank with a cluster of its own would have a writer of its own, and these would fight for the run.
    """
    from ray._private import state, worker

    if not getattr(getattr(worker, "_global_node", None), "head", False):
        return False
    try:
        return all(job["IsDead"] or job["DriverPid"] == os.getpid() for job in state.jobs())
    except Exception:  # another Ray
        return False


def forget_exit_handler() -> None:
    """In a fork: Ray's exit handler would wait for threads that only the parent has.

    Not by ``ray.shutdown``, which is ours perhaps (see sharing) and is not what Ray registered.
    """
    shutdown = getattr(sys.modules.get("ray._private.worker"), "shutdown", None)  # it may be half imported
    if shutdown is not None:
        atexit.unregister(shutdown)


def train_run_id() -> str | None:
    """Unique to this run of a Ray Train trainer and the same in its retries; its name may be used again tomorrow."""
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        return str(get_train_context().train_run_context.run_id)
    except Exception:  # another Ray
        return None


def train_failures() -> int | None:
    """After how many failures Ray Train gives up; negative for never."""
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        return int(get_train_context().train_run_context.run_config.failure_config.max_failures)
    except Exception:  # another Ray
        return None


# Starting a cluster


def leave_out_what_idles(dashboard: bool) -> None:
    """Let ``ray.init`` not start what nobody here uses; together it takes a third of a core from the training.

    That is the autoscaler, what carries workers' logs to a driver (the dashboard reads the files), and what Ray starts
    of a dashboard that is off.
    """
    with suppress(ImportError):  # another Ray
        from ray._private.node import Node

        for start in ("start_monitor", "start_log_monitor", *(() if dashboard else ("start_api_server",))):
            if hasattr(Node, start):
                setattr(Node, start, lambda *_, **__: None)


def be_patient() -> None:
    """Let ``ray.init`` wait for its raylet on a machine whose cores all train.

    Ray asks for it in a loop without a pause, which takes a core away from it, and gives up after 30 s.
    """
    from ray._private import services

    ask: Callable[..., Any] | None = getattr(services, "get_node", None)
    if ask is None:
        return  # another Ray, with its own idea of patience

    def ask_patiently(*args: Any, **kwargs: Any) -> Any:
        deadline = time.monotonic() + RAYLET_DEADLINE_S
        while True:
            try:
                return ask(*args, **kwargs)
            except RuntimeError:  # it has not registered yet
                if time.monotonic() >= deadline:
                    raise
            time.sleep(POLL_S)

    services.get_node = ask_patiently
    _choose_ports(services)


def _choose_ports(services: Any) -> None:
    """Tell a raylet the ports of its agents: it ends itself where they have not told them after 15 s, or where one is
    taken.

    See ray-project/ray#65983. The port of one of them it reads from a file only, so that is there before.
    """
    from ray import _raylet

    persist: Callable[..., Any] | None = getattr(_raylet, "persist_port", None)
    start: Callable[..., Any] | None = getattr(services, "start_raylet", None)
    if persist is None or start is None or not {*AGENT_PORTS, "node_id"} <= signature(start).parameters.keys():
        return  # another Ray

    def start_with_ports(*args: Any, **kwargs: Any) -> Any:
        given = signature(start).bind(*args, **kwargs).arguments
        given |= dict(zip(AGENT_PORTS, free_ports(len(AGENT_PORTS)), strict=True))
        persist(given["session_dir"], given["node_id"], LISTEN_PORT, given[LISTEN_PORT])
        return start(**given)

    services.start_raylet = start_with_ports
