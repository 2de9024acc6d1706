"""Which process of which job this is: rank, world size, and one run id for the whole job."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import psutil

from swanlab_ray.actors.settings import ObserverSettings, SettingsError
from swanlab_ray.actors.wire.naming import RUN_ID_CHARACTERS, is_run_id, run_id_of, slug
from swanlab_ray.observer.job.launchers import detail, is_set, place_of, whole
from swanlab_ray.observer.ray_cluster import patches
from swanlab_ray.observer.script.notices import warn_once
from swanlab_ray.observer.trainers.internals import default_store

STORE_TIMEOUT_S = 60.0
"""How long a store is waited for that the ranks agree through; then it is tried again."""
RUN_ID_KEY = "swanlab-ray/run-id"
STORE_POLL_S = 0.1
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
    run: int = 1
    """Which run this is of those that its processes keep one after another, the same on every rank."""


LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


def identify(env: Mapping[str, str] = os.environ) -> Identity:
    """Rank and world size of this process: from Ray Train, from ``torch.distributed`` where several processes have
    initialised it, from the launcher's environment; else 0 of 1.

    Raises:
        SettingsError: the launcher's variables contradict each other.
    """
    train = _ray_train_context()
    if train is not None:
        rank, size, local = train.get_world_rank(), train.get_world_size(), train.get_local_rank()
        nodes = max(1, size // max(1, train.get_local_world_size()))
        return Identity(rank, size, local, nodes, True, train.get_node_rank())
    group = _process_group()
    try:
        place = place_of(env)
    except SettingsError:
        if group is None:
            raise
        place = None
    if group is not None and group[1] > 1 and (place is None or (place.rank, place.world_size) != group):
        return _identity_in_group(*group, env)
    if place is None:
        if group is None:
            _warn_of_half_a_launcher(env)
        return Identity(0, 1, 0, 1)
    return Identity(place.rank, place.world_size, place.local_rank, place.nodes, node=place.node)


def _process_group() -> tuple[int, int] | None:
    """Rank and world size of torch.distributed where the training has initialised it. Imports nothing."""
    distributed = sys.modules.get("torch.distributed")
    try:
        if distributed is None or not distributed.is_available() or not distributed.is_initialized():
            return None
        return int(distributed.get_rank()), int(distributed.get_world_size())
    except Exception:  # it is just being imported, or initialised
        return None


def _identity_in_group(rank: int, size: int, env: Mapping[str, str]) -> Identity:
    """Of a process that nobody's variables describe: started by torch.multiprocessing.spawn, or by Lightning."""
    local_size = detail(env, "LOCAL_WORLD_SIZE", below=size + 1)
    if not local_size and _meets_on_this_machine(env):
        local_size = size
    nodes = -(-size // local_size) if local_size else size
    local = detail(env, "LOCAL_RANK", below=size)
    if local is None:
        local = rank % local_size if local_size else 0
    node = detail(env, "NODE_RANK", below=nodes)
    if node is None:
        node = rank // local_size if local_size else rank
    return Identity(rank, size, local, nodes, node=node)


def _meets_on_this_machine(env: Mapping[str, str]) -> bool:
    """Whether the processes of torch.distributed found each other by an address or a file that only this one has."""
    store = default_store()
    while (inner := getattr(store, "underlying_store", None)) is not None:
        store = inner
    host = getattr(store, "host", None) or env.get("MASTER_ADDR", "")
    return host in LOOPBACK or type(store).__name__ in ("FileStore", "HashStore")


def _warn_of_half_a_launcher(env: Mapping[str, str]) -> None:
    """Without a rank and a size each process would keep a run of its own, and nobody would know why."""
    several = {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1}  # from which value on there must be others
    told = [name for name, least in several.items() if is_set(env, name) and (whole(env[name]) or 0) >= least]
    if told:
        words = " and ".join(f"{name}={env[name]}" for name in told)
        missing = " and ".join(name for name in ("RANK", "WORLD_SIZE") if not is_set(env, name))
        warn_once(
            "half a launcher",
            f"{words} but no {missing} is set and torch.distributed is not initialised, so this process is taken for a "
            "job of its own: call connect() after torch.distributed.init_process_group(), or set RANK and WORLD_SIZE.",
        )


def warn_of_a_later_group(rank: int, world_size: int) -> None:
    """Say that ``connect()`` came too early, where torch.distributed has told since that there are several ranks."""
    group = _process_group()
    if world_size == 1 and group is not None and group[1] > 1:
        warn_once(
            "later group",
            f"torch.distributed says that this process is rank {group[0]} of {group[1]}, but it was initialised after "
            f"connect(), so it reports as rank {rank} of 1, in a run of its own: call connect() after "
            "torch.distributed.init_process_group().",
        )


def check_run_id(settings: ObserverSettings, identity: Identity, env: Mapping[str, str] = os.environ) -> None:
    """Refuse a job of several processes that share nothing from which a run id could be worked out.

    Raises:
        SettingsError: says which variable to set.
    """
    if settings.run_id or identity.world_size == 1 or _ray_train_context() or _agent_store_address(env):
        return
    if scheduler_step(identity, env) or default_store() is not None:
        return
    raise SettingsError(
        f"Cannot tell this job of {identity.world_size} processes from others on the cluster: call connect() after "
        "torch.distributed.init_process_group(), set OBSERVER_RUN_ID to one value for all of its ranks, or start it "
        "with torchrun."
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
    job = _job(settings, identity, env)
    if job is None:
        return fresh_run_id()
    return job if identity.run == 1 else f"{job[: RUN_ID_CHARACTERS - len(str(identity.run)) - 1]}-{identity.run}"


def _job(settings: ObserverSettings, identity: Identity, env: Mapping[str, str]) -> str | None:
    """The id of this job's first run, the same on every rank and after a restart; None where nothing is shared."""
    train = _ray_train_context()
    if train is not None:
        return _ray_train_run_id(train)
    address = _agent_store_address(env)
    if address:
        store = _agent_store(*address, timeout=timedelta(seconds=STORE_TIMEOUT_S))
        return _agree(store, fresh_run_id(env.get("TORCHELASTIC_RUN_ID", "")))
    step = scheduler_step(identity, env)
    if step is not None:
        # Programs of one process are told apart by their directory as well: an id means one experiment in the cloud.
        return step if identity.world_size > 1 else run_id_of(f"{step}-{_short_hash(str(settings.log_dir))}")
    store = default_store()
    if store is None:
        return None
    ours = _of_torchrun(env)
    if ours is not None and identity.rank > 0:
        _wait_for_rank_0(store)  # whose proposal is the same after a restart
    return _agree(store, ours or fresh_run_id())


def _wait_for_rank_0(store: Any) -> None:
    """Not by the store's own ``wait``: meanwhile the training could not use it, and might wait for us."""
    until = time.monotonic() + STORE_TIMEOUT_S
    with suppress(Exception):
        while time.monotonic() < until and not store.check([RUN_ID_KEY]):
            time.sleep(STORE_POLL_S)


def scheduler_step(identity: Identity, env: Mapping[str, str] = os.environ) -> str | None:
    """The Slurm step or MPI launch that has started this rank, of which other programs may be part as well."""
    if identity.in_ray_train or _agent_store_address(env):
        return None
    try:
        place = place_of(env)
    except SettingsError:
        place = None
    if place is not None and place.world_size != identity.world_size:
        return None  # ranks that this program has started by itself
    return _scheduler_job(env)


def most_restarts(env: Mapping[str, str] = os.environ) -> int:
    """How often the launcher starts this job again after failures, in all."""
    if _ray_train_context() is not None:
        most = patches.train_failures() or 0
        return most if 0 <= most < sys.maxsize else sys.maxsize
    return _count(env, "TORCHELASTIC_MAX_RESTARTS")


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
    return whole(env.get(name, "")) or 0


def gpu_name(local_rank: int, env: Mapping[str, str] = os.environ) -> str | None:
    """Name and index of the GPU this rank trains on, without making a CUDA context."""
    try:
        cuda = sys.modules["torch"].cuda
        if not cuda.is_available():
            return None
        index = cuda.current_device() if cuda.is_initialized() else local_rank
    except Exception:  # no torch, or it is just being imported, or its device has failed
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


def fresh_run_id(launcher_id: str = "") -> str:
    """An id that no other run has, after the launcher's name of the job where that says anything."""
    return _run_id(launcher_id, time.time(), secrets.token_hex(3))


def _of_torchrun(env: Mapping[str, str]) -> str | None:
    """An id by the torchrun process that has started this one, which outlives its ranks; for an elastic job whose store
    does not, since it is one of ``torch.distributed`` (``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``)."""
    if not is_set(env, "TORCHELASTIC_RUN_ID"):
        return None
    try:
        torchrun = psutil.Process(os.getppid())
        began = torchrun.create_time()
    except psutil.Error:  # it has just ended
        return None
    return _run_id(env["TORCHELASTIC_RUN_ID"], began, _short_hash(f"{socket.gethostname()} {torchrun.pid} {began}"))


def _run_id(launcher_id: str, began: float, unique: str) -> str:
    name = slug(launcher_id)
    plain = name in ("", "none") or re.fullmatch(r"[0-9a-f]{8}-[0-9a-f-]{27}", name)
    return f"{'' if plain else name[:32] + '-'}{time.strftime('%Y%m%d-%H%M%S', time.localtime(began))}-{unique}"


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


def trial_of_tune() -> str | None:
    """The trial of Ray Tune whose worker this is. Imports nothing: a worker has it imported already."""
    tune = sys.modules.get("ray.tune")
    try:
        return None if tune is None else tune.get_context().get_trial_id()
    except Exception:
        return None


def _ray_train_run_id(context: Any) -> str:
    name = slug(context.get_experiment_name() or "") or "ray-train"
    unique = patches.train_run_id()
    if unique is None:
        import ray

        unique = ray.get_runtime_context().get_job_id()
    return run_id_of(f"{name[:46]}-{unique[:8]}")


def _agent_store_address(env: Mapping[str, str]) -> tuple[str, int] | None:
    """Where torchrun's agent keeps the store of this job, if it is one that the workers share."""
    port = whole(env.get("MASTER_PORT", ""))
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not port:
        return None
    return env.get("MASTER_ADDR") or "127.0.0.1", port


def _agent_store(host: str, port: int, **options: Any) -> Any:
    from torch.distributed import TCPStore

    # Not counted among the workers that the server waits for.
    return TCPStore(host, port, is_master=False, wait_for_workers=False, **options)


def shared_store(env: Mapping[str, str] = os.environ) -> Any:
    """A store that all ranks of the job have: of torchrun's agent, or of torch.distributed; None where there is none
    yet."""
    address = _agent_store_address(env)
    return _agent_store(*address, timeout=timedelta(seconds=STORE_TIMEOUT_S)) if address else default_store()


def _agree(store: Any, proposal: str) -> str:
    """The first proposal that reached the store. No collective: each rank asks for itself."""
    agreed = bytes(store.compare_set(RUN_ID_KEY, "", proposal)).decode(errors="replace")
    return agreed if is_run_id(agreed) else run_id_of(agreed)


def _scheduler_job(env: Mapping[str, str]) -> str | None:
    if is_set(env, "SLURM_JOB_ID") and is_set(env, "SLURM_STEP_ID"):
        job = env.get("SLURM_ARRAY_JOB_ID") or env["SLURM_JOB_ID"]
        task = f"_{env['SLURM_ARRAY_TASK_ID']}" if is_set(env, "SLURM_ARRAY_TASK_ID") else ""
        cluster = slug(env.get("SLURM_CLUSTER_NAME", ""))
        return run_id_of(f"slurm-{cluster + '-' if cluster else ''}{job}{task}.{env['SLURM_STEP_ID']}")
    if is_set(env, "PMIX_NAMESPACE"):
        return run_id_of(f"mpi-{env['PMIX_NAMESPACE']}")
    return None


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:6]
