"""Which process of which job this is: rank, world size, and one run id for the whole job."""

from __future__ import annotations

import os
import re
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

from swanlab_ray.actors.settings import ObserverSettings, SettingsError

STORE_DEADLINE_S = 5.0
"""How long torchrun's store is waited for where only a nonce is asked of it."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Place of this process in its job."""

    rank: int
    world_size: int
    local_rank: int
    nodes: int
    """Machines of the job; as many as processes where the launcher does not tell."""
    in_ray_train: bool = False
    node: int = 0
    """Index of this process's machine."""


# Launchers, each with its variables for rank, world size, local rank and local world size.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun, accelerate
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    # The step's variables: a batch script itself has SLURM_NTASKS without being one of these tasks.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


def identify(env: Mapping[str, str] = os.environ) -> Identity:
    """Rank and world size of this process, from Ray Train or the launcher's environment; else 0 of 1.

    Raises:
        SettingsError: the launcher's variables contradict each other.
    """
    train = _ray_train_context()
    if train is not None:
        rank, size, local = train.get_world_rank(), train.get_world_size(), train.get_local_rank()
        nodes = max(1, size // max(1, train.get_local_world_size()))
        return Identity(rank, size, local, nodes, True, train.get_node_rank())
    for rank_name, size_name, local_name, local_size_name in _LAUNCHERS:
        if rank_name in env and size_name in env:
            rank, size = _number(env, rank_name), _number(env, size_name)
            if not 0 <= rank < size:
                raise SettingsError(
                    f"{rank_name}={rank} does not fit {size_name}={size}: ranks go from 0 to {size - 1}."
                )
            told = env.get(local_size_name) or env.get("LOCAL_SIZE", "")  # LOCAL_SIZE: DeepSpeed's launcher
            local_size = int(re.match(r"\d*", told)[0] or 1)  # type: ignore[index]
            local_size = max(1, local_size)
            local = int(env.get(local_name, "0") or 0)
            return Identity(rank, size, local, -(-size // local_size), node=rank // local_size)
    return Identity(0, 1, 0, 1)


def check_run_id(settings: ObserverSettings, identity: Identity, env: Mapping[str, str] = os.environ) -> None:
    """Refuse a job of several processes that share nothing from which a run id could be worked out.

    Raises:
        SettingsError: says which variable to set.
    """
    if settings.run_id or identity.world_size == 1 or _ray_train_context() or _agent_store_address(env):
        return
    if _scheduler_job(env) or _default_store() is not None:
        return
    raise SettingsError(
        f"Cannot tell this job of {identity.world_size} processes from others on the cluster: set OBSERVER_RUN_ID to "
        "one value for all of its ranks, or start it with torchrun."
    )


def resolve_run_id(settings: ObserverSettings, identity: Identity, env: Mapping[str, str] = os.environ) -> str:
    """The run id of this job: the same on every rank, another one for every other job.

    In this order: explicit; Ray Train's run; agreed through the store of torchrun's agent or of torch.distributed;
    the step of Slurm or MPI; a new one for a single process. Under torchrun ``TORCHELASTIC_RUN_ID`` alone does not
    tell jobs apart (a static rendezvous calls every job ``none``, people copy ``--rdzv-id=100``), so rank 0's proposal
    is agreed on in the agent's store, which belongs to this job only and outlives its restarts.

    May wait for the store, so it runs on the flusher thread.
    """
    if settings.run_id:
        return settings.run_id
    train = _ray_train_context()
    if train is not None:
        return _ray_train_run_id(train)
    address = _agent_store_address(env)
    if address:
        return _agree(_agent_store(*address), fresh_run_id(env.get("TORCHELASTIC_RUN_ID", "")))
    job = _scheduler_job(env)
    if job:
        return job
    store = _default_store()
    if store is not None:
        return _agree(store, fresh_run_id())
    return fresh_run_id()


def most_restarts(env: Mapping[str, str] = os.environ) -> int:
    """How often the launcher starts this job again after failures, in all."""
    if _ray_train_context() is not None:
        try:
            from ray.train.v2._internal.execution.context import get_train_context

            most = int(get_train_context().train_run_context.run_config.failure_config.max_failures)
            return most if most >= 0 else sys.maxsize
        except Exception:
            return 0  # another Ray
    try:
        return int(env["TORCHELASTIC_MAX_RESTARTS"])
    except (KeyError, ValueError):
        return 0


class Launch(NamedTuple):
    """Which start of which job a process belongs to."""

    nonce: str
    """The same in all processes of a job and in no other job; empty where nothing tells that."""
    attempt: int
    """How often the launcher has started the job's processes again, as far as it says."""


def which_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """The launch of this process, from Ray Train, torchrun, Slurm or MPI.

    May wait a few seconds for torchrun's store, so it runs on the flusher thread.
    """
    train = _ray_train_context()
    if train is not None:
        return Launch(_ray_train_run_id(train), 0)  # its retries are not counted anywhere
    address = _agent_store_address(env)
    if address:
        try:
            store = _agent_store(*address, timeout=timedelta(seconds=STORE_DEADLINE_S))
            nonce = bytes(store.compare_set("swanlab-ray/nonce", "", secrets.token_hex(8))).decode()
        except Exception:  # it has ended with its agent, or cannot be reached
            nonce = ""
        return Launch(nonce, _count(env, "TORCHELASTIC_RESTART_COUNT"))
    return Launch(_scheduler_job(env) or "", _count(env, "SLURM_RESTART_COUNT"))


def _count(env: Mapping[str, str], name: str) -> int:
    told = env.get(name, "")
    return int(told) if told.isdecimal() else 0


def gpu_name(local_rank: int, env: Mapping[str, str] = os.environ) -> str | None:
    """Name and index of the GPU this rank trains on, without making a CUDA context."""
    try:
        cuda = sys.modules["torch"].cuda
        if not cuda.is_available():
            return None
        index = cuda.current_device() if cuda.is_initialized() else local_rank
    except (KeyError, AttributeError):  # no torch, or it is just being imported
        return None
    visible = [part for part in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    physical = visible[index] if index < len(visible) else str(index)
    try:
        import pynvml

        pynvml.nvmlInit()
        by_id = pynvml.nvmlDeviceGetHandleByIndex if physical.isdigit() else pynvml.nvmlDeviceGetHandleByUUID
        name = pynvml.nvmlDeviceGetName(by_id(int(physical) if physical.isdigit() else physical))
    except Exception:
        name = "GPU"
    return f"{name} {physical}"


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise SettingsError(f"{name}={env[name]!r} is not a number: unset it, or let the launcher set it.") from None


def fresh_run_id(launcher_id: str = "") -> str:
    name = _slug(launcher_id)
    plain = name in ("", "none") or re.fullmatch(r"[0-9a-f]{8}-[0-9a-f-]{27}", name)
    return f"{'' if plain else name[:32] + '-'}{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def _slug(text: str) -> str:
    return re.sub(r"[^0-9A-Za-z_.-]+", "-", text).strip("-")


def _ray_train_context() -> Any:
    """Ray Train's context if this is one of its workers. Imports nothing: a worker has it imported already."""
    train = sys.modules.get("ray.train")
    if train is None:
        return None
    try:
        context = train.get_context()
        context.get_world_rank()
    except Exception:
        return None
    return context


def _ray_train_run_id(context: Any) -> str:
    name = _slug(context.get_experiment_name() or "ray-train")
    try:
        # Unique to this run of the trainer and the same in its retries; the name may be used again tomorrow.
        from ray.train.v2._internal.execution.context import get_train_context

        unique = get_train_context().train_run_context.run_id[:8]
    except Exception:
        import ray

        unique = ray.get_runtime_context().get_job_id()
    return f"{name[:48]}-{unique}"


def _agent_store_address(env: Mapping[str, str]) -> tuple[str, int] | None:
    """Where torchrun's agent keeps the store of this job, if it is one that the workers share."""
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not env.get("MASTER_PORT", "").isdigit():
        return None
    return env.get("MASTER_ADDR", "127.0.0.1"), int(env["MASTER_PORT"])


def _agent_store(host: str, port: int, **options: Any) -> Any:
    from torch.distributed import TCPStore

    # Not counted among the workers that the server waits for.
    return TCPStore(host, port, is_master=False, wait_for_workers=False, **options)


def _default_store() -> Any:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    try:
        return distributed.distributed_c10d._get_default_store()
    except Exception:
        return None


def _agree(store: Any, proposal: str) -> str:
    """The first proposal that reached the store. No collective: each rank asks for itself."""
    return bytes(store.compare_set("swanlab-ray/run-id", "", proposal)).decode()


def _scheduler_job(env: Mapping[str, str]) -> str | None:
    if "SLURM_JOB_ID" in env and "SLURM_STEP_ID" in env:
        job = env.get("SLURM_ARRAY_JOB_ID", env["SLURM_JOB_ID"])
        task = f"_{env['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in env else ""
        cluster = _slug(env.get("SLURM_CLUSTER_NAME", ""))
        return f"slurm-{cluster + '-' if cluster else ''}{job}{task}.{env['SLURM_STEP_ID']}"
    if "PMIX_NAMESPACE" in env:
        return f"mpi-{_slug(env['PMIX_NAMESPACE'])}"
    return None
