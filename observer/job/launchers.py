"""What a launcher's environment variables say of this process. They may be missing, left over, or malformed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from swanlab_ray.actors.settings import SettingsError
from swanlab_ray.observer.script.notices import warn_once

MOST_PROCESSES = 1_000_000


@dataclass(frozen=True, slots=True)
class Place:
    """Where a launcher has put this process."""

    rank: int
    world_size: int
    local_rank: int
    node: int
    nodes: int
    """Machines; as many as processes where the launcher does not tell."""


@dataclass(frozen=True, slots=True)
class _Launcher:
    rank: str
    size: str
    local_rank: str
    local_sizes: tuple[str, ...]
    """Processes of this node, or a list of those of each node as Slurm writes it; the first that is set."""
    node: str = ""
    """Index of this node, where ranks need not lie on nodes in their order."""
    needs: tuple[str, ...] = ()
    """What else has to be set, or the others are somebody else's."""


_LAUNCHERS = (
    # torchrun, accelerate; DeepSpeed's launcher has LOCAL_SIZE.
    _Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    _Launcher(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    # MPICH and Intel MPI (Hydra). Before Slurm: Hydra starts its proxies, one a node, by srun, and its ranks have their
    # variables. Slurm's PMI-2 sets two of these for its own tasks as well, without the third.
    _Launcher("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",), needs=("MPI_LOCALRANKID",)),
    # The step's variables: a batch script itself has SLURM_NTASKS without being one of these tasks.
    _Launcher("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ("SLURM_STEP_TASKS_PER_NODE",), "SLURM_NODEID"),
)


def place_of(env: Mapping[str, str]) -> Place | None:
    """What the launcher says, if there was one. A wrong detail is told and left out.

    Raises:
        SettingsError: rank and world size are no numbers, or contradict each other.
    """
    telling = [one for one in _LAUNCHERS if all(is_set(env, name) for name in (one.rank, one.size, *one.needs))]
    if not telling:
        return None
    launcher = telling[0]
    rank, size = _number(env, launcher.rank), _number(env, launcher.size)
    if not 1 <= size <= MOST_PROCESSES:
        raise SettingsError(f"{launcher.size}={size} is no number of processes: unset it, or let the launcher set it.")
    if not 0 <= rank < size:
        raise SettingsError(
            f"{launcher.rank}={rank} does not fit {launcher.size}={size}: ranks go from 0 to {size - 1}."
        )
    return _placed(env, next((one for one in telling if _details(env, one, rank, size)), launcher), rank, size)


def _details(env: Mapping[str, str], launcher: _Launcher, rank: int, size: int) -> bool:
    """Whether it tells the place on the machine of this rank: people hand on what Slurm or MPI has told them as RANK
    and WORLD_SIZE, and nothing else."""
    agrees = whole(env[launcher.rank]) == rank and whole(env[launcher.size]) == size
    return agrees and is_set(env, launcher.local_rank)


def is_set(env: Mapping[str, str], name: str) -> bool:
    """Whether a variable says anything: an empty one does not."""
    return bool(env.get(name, "").strip())


def whole(text: str) -> int | None:
    """A whole number of 0 or more, of at most 9 digits; None if the text is anything else."""
    return int(text) if re.fullmatch(r"\s*\d{1,9}\s*", text, re.ASCII) else None


def detail(env: Mapping[str, str], name: str, below: int = MOST_PROCESSES) -> int | None:
    """A number that the job can be known without. What cannot be one is told and left out."""
    if not is_set(env, name):
        return None
    number = whole(env[name])
    if number is None or number >= below:
        _tell_ignored(env, name)
        return None
    return number


def _number(env: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\s*[+-]?\d{1,18}\s*", env[name], re.ASCII):
        raise SettingsError(f"{name}={env[name]!r:.80} is not a number: unset it, or let the launcher set it.")
    return int(env[name])


def _placed(env: Mapping[str, str], launcher: _Launcher, rank: int, size: int) -> Place:
    per_node = _per_node(env, launcher, rank, size)
    local_rank = detail(env, launcher.local_rank, below=size)
    if per_node is None:
        return Place(rank, size, local_rank or 0, node=rank, nodes=size)
    firsts = [0, *accumulate(per_node)]
    node = next(node for node in range(len(per_node)) if rank < firsts[node + 1])
    if launcher.node:
        told = detail(env, launcher.node, below=len(per_node))
        node = node if told is None else told
    if local_rank is None:
        local_rank = rank - firsts[node] if 0 <= rank - firsts[node] < per_node[node] else 0
    return Place(rank, size, local_rank, node, len(per_node))


def _per_node(env: Mapping[str, str], launcher: _Launcher, rank: int, size: int) -> list[int] | None:
    """Processes of each node, if the launcher tells."""
    name = next((name for name in launcher.local_sizes if is_set(env, name)), None)
    if name is None:
        return None
    told = _counts(env[name])
    if len(told) == 1 and told[0] <= size:  # each node has as many, but perhaps the last
        told = told * (size // told[0])
        told += [size - sum(told)] if sum(told) < size else []
    if not told or sum(told) != size:
        _tell_ignored(env, name)
        return None
    return told


def _counts(text: str) -> list[int]:
    """What Slurm writes as ``2(x3),1``; empty where it is anything else, or no node's processes."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,7})(?:\(x(\d{1,7})\))?\s*", part, re.ASCII)
        if match is None or int(match[1]) == 0 or len(counts) + int(match[2] or 1) > MOST_PROCESSES:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _tell_ignored(env: Mapping[str, str], name: str) -> None:
    warn_once(f"launcher {name}", f"{name}={env[name]!r:.80} cannot be right, so it is not used.")
