"""Launchers' variables as they are met: whole, half, left over from another launcher, malformed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from swanlab_ray.actors.settings import ObserverSettings, SettingsError
from swanlab_ray.actors.wire.naming import is_run_id
from swanlab_ray.observer.job.identity import (
    Identity,
    check_run_id,
    fresh_run_id,
    identify,
    most_restarts,
    resolve_run_id,
    warn_of_a_later_group,
    which_launch,
)

ONE = Identity(0, 1, 0, 1)
FOUR = Identity(1, 4, 1, 1)
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "5", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}

_NAMES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    *("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    *("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"),
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_CLUSTER_NAME"),
    *("SLURM_RESTART_COUNT", "PMIX_NAMESPACE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS"),
    "TORCHELASTIC_RESTART_COUNT",
)
_NUMBERS = ("0", "1", "2 ", "4", "8", "-1", "+3", "1.5", "1_0", "²", "٣", "0x2", "9" * 30, "9" * 5000)
_LISTS = ("2(x3)", "2(x2),1", "0(x2)", "2(x99999999)", "(x2)", "2(x")
_VALUES = st.sampled_from(
    (*_NUMBERS, *_LISTS, "", " ", "none", "x", ".", "..", "../../x", "a" * 300, "\udc80", "\x1b[1m")
)
_ENVIRONMENTS = st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=14)


@given(_ENVIRONMENTS)
@example({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"})
@example({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""})
@example({"RANK": "0", "WORLD_SIZE": "0"})
@example({"RANK": "0", "WORLD_SIZE": "9" * 18, "LOCAL_WORLD_SIZE": "1"})
@example({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "²", "TORCHELASTIC_USE_AGENT_STORE": "True"})
def test_any_environment_is_a_place_in_a_job_or_one_sentence(env: dict[str, str]) -> None:
    try:
        place = identify(env)
        check_run_id(ObserverSettings(project="p"), place, env)
    except SettingsError as error:
        said = str(error)
        assert "\n" not in said
        assert len(said) < 400
        said.encode()
        return
    assert 0 <= place.rank < place.world_size
    assert 0 <= place.local_rank < place.world_size
    assert 0 <= place.node < place.nodes <= place.world_size
    assert is_run_id(resolve_run_id(ObserverSettings(project="p"), place, env))
    assert 0 <= most_restarts(env) < 1 << 31
    assert 0 <= which_launch(env).attempt < 1 << 31


@pytest.mark.parametrize(
    ("env", "identity"),
    [
        # Details that cannot be right do not cost the rest.
        (TORCHRUN | {"LOCAL_RANK": "x"}, Identity(5, 8, 1, 2, node=1)),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, Identity(5, 8, 1, 2, node=1)),
        (TORCHRUN | {"LOCAL_RANK": ""}, Identity(5, 8, 1, 2, node=1)),
        (TORCHRUN | {"LOCAL_RANK": "99"}, Identity(5, 8, 1, 2, node=1)),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, Identity(5, 8, 1, 8, node=5)),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "16"}, Identity(5, 8, 1, 8, node=5)),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "", "LOCAL_SIZE": "4 "}, Identity(5, 8, 1, 2, node=1)),
        (TORCHRUN | {"RANK": "5 ", "WORLD_SIZE": " 8"}, Identity(5, 8, 1, 2, node=1)),
        # Empty variables are those of no launcher.
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}, ONE),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,1(x2)", "RANK": "", "WORLD_SIZE": "2"}, Identity(3, 5, 0, 3, node=1)),
        # Nodes with different numbers of tasks, and tasks that go round the nodes.
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,1(x2)", "SLURM_NODEID": "1"}, Identity(3, 5, 0, 3, node=1)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,2", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"},
         Identity(3, 5, 1, 2, node=1)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,2", "SLURM_NODEID": "0", "SLURM_LOCALID": "2"},
         Identity(3, 5, 2, 2, node=0)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,2", "SLURM_NODEID": "7"}, Identity(3, 5, 0, 2, node=1)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, Identity(3, 5, 0, 5, node=3)),  # six: not this step's
        # MPICH and Intel MPI; and what people hand on of a launcher's variables, which says nothing of the machine.
        (HYDRA, Identity(5, 8, 1, 2, node=1)),
        (HYDRA | {"RANK": "5", "WORLD_SIZE": "8"}, Identity(5, 8, 1, 2, node=1)),
        (HYDRA | {"RANK": "0", "WORLD_SIZE": "4"}, Identity(0, 4, 0, 4)),
        # Hydra has started a proxy on each node by srun; or srun its tasks, and told them two of Hydra's variables.
        (SLURM | HYDRA, Identity(5, 8, 1, 2, node=1)),
        (SLURM | {"PMI_RANK": "3", "PMI_SIZE": "5", "SLURM_STEP_TASKS_PER_NODE": "3,2"}, Identity(3, 5, 0, 2, node=1)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,1(x2)", "RANK": "3", "WORLD_SIZE": "5"},
         Identity(3, 5, 0, 3, node=1)),
    ],
)  # fmt: skip
def test_what_can_be_known_of_a_launcher_is_known(env: dict[str, str], identity: Identity) -> None:
    assert identify(env) == identity


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' is not a number: unset it, or let the launcher set it."),
        ({"RANK": "1_0", "WORLD_SIZE": "20"}, "RANK='1_0' is not a number: unset it, or let the launcher set it."),
        ({"RANK": "0", "WORLD_SIZE": "0"},
         "WORLD_SIZE=0 is no number of processes: unset it, or let the launcher set it."),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 does not fit WORLD_SIZE=2: ranks go from 0 to 1."),
        ({"RANK": "0", "WORLD_SIZE": "9" * 15},
         f"WORLD_SIZE={'9' * 15} is no number of processes: unset it, or let the launcher set it."),
        ({"SLURM_PROCID": "7", "SLURM_STEP_NUM_TASKS": "4"},
         "SLURM_PROCID=7 does not fit SLURM_STEP_NUM_TASKS=4: ranks go from 0 to 3."),
    ],
)  # fmt: skip
def test_a_rank_that_cannot_be_known_is_refused(env: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        identify(env)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK='x' cannot be right, so it is not used."),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE='0' cannot be right, so it is not used."),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, "SLURM_STEP_TASKS_PER_NODE='2(x3)' cannot be right"),
        (
            {"LOCAL_RANK": "1"},
            "LOCAL_RANK=1 but no RANK and WORLD_SIZE is set and torch.distributed is not initialised",
        ),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2", "NODE_RANK": "0"}, "WORLD_SIZE=2 but no RANK is set"),
        ({"RANK": "1"}, "RANK=1 but no WORLD_SIZE is set"),
    ],
)
def test_what_cannot_be_used_is_said(env: dict[str, str], sentence: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "swanlab_ray"):
        identify(env)
    (record,) = caplog.records
    assert sentence in record.getMessage()


@pytest.mark.parametrize("env", [{}, TORCHRUN, {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {"LOCAL_RANK": "0"}])
def test_nothing_is_said_of_a_launcher_that_is_right_or_not_there(
    env: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    identify(env)
    assert not caplog.records


@pytest.fixture
def group() -> Iterator[Callable[..., None]]:
    """Initialise torch.distributed as one of several processes, without the others."""
    import torch.distributed as dist
    import torch.testing._internal.distributed.fake_pg  # noqa: F401 - it registers the backend

    def initialise(rank: int, size: int, store: Any = None) -> None:
        dist.init_process_group("fake", rank=rank, world_size=size, store=store or dist.HashStore())

    yield initialise
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("env", "rank", "size", "identity"),
    [
        ({}, 1, 4, FOUR),  # torch.multiprocessing.spawn
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}, 1, 4, FOUR),  # Lightning
        ({"LOCAL_RANK": "1", "NODE_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 3, 4,
         Identity(3, 4, 1, 2, node=1)),
        # An interactive shell's step, in which a script starts ranks by itself.
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, 1, 4, FOUR),
        ({"RANK": "x", "WORLD_SIZE": "4"}, 1, 4, FOUR),
        (TORCHRUN, 5, 8, Identity(5, 8, 1, 2, node=1)),  # they agree, and the launcher knows more
        (TORCHRUN, 0, 1, Identity(5, 8, 1, 2, node=1)),  # each rank has a group of its own
    ],
)  # fmt: skip
def test_an_initialised_torch_distributed_knows_rank_and_size(
    env: dict[str, str], rank: int, size: int, identity: Identity, group: Callable[..., None]
) -> None:
    group(rank, size)
    assert identify(env) == identity


def test_ranks_that_a_script_has_started_agree_through_their_own_store(
    group: Callable[..., None], tmp_path: Path
) -> None:
    """Not on the Slurm step in which the script runs, nor on torchrun's words for another job."""
    import torch.distributed as dist

    env = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    settings = ObserverSettings(project="p")
    agreed = []
    for rank in range(2):
        group(rank, 2, dist.FileStore(str(tmp_path / "rendezvous"), 2))
        place = identify(env)
        check_run_id(settings, place, env)
        agreed.append(resolve_run_id(settings, place, env))
        agreed.append(resolve_run_id(settings, replace(place, run=2), env))
        dist.destroy_process_group()
    assert agreed[:2] == agreed[2:]
    assert agreed[1] == f"{agreed[0]}-2"
    assert not agreed[0].startswith("slurm")


def test_an_elastic_job_keeps_its_id_where_its_store_does_not_outlive_its_ranks(
    group: Callable[..., None], tmp_path: Path
) -> None:
    """It is that of rank 0, and goes by the process of torchrun, which does."""
    import torch.distributed as dist

    settings = ObserverSettings(project="p")

    def agreed(attempt: int, job: str = "job") -> list[str]:
        ids = []
        for rank in range(2):
            group(rank, 2, dist.FileStore(str(tmp_path / f"rendezvous{job}{attempt}"), 2))
            env = {"TORCHELASTIC_RUN_ID": job, "RANK": str(rank), "WORLD_SIZE": "2"}
            ids.append(resolve_run_id(settings, identify(env), env))
            dist.destroy_process_group()
        return ids

    first = agreed(0)
    assert first == agreed(1) == [first[0]] * 2
    assert first[0].startswith("job-")
    assert agreed(2, "other") != first


def test_ranks_on_several_machines_are_not_taken_for_one(group: Callable[..., None]) -> None:
    """Nobody tells how many machines there are: a cluster of one machine would not serve them."""
    import torch.distributed as dist

    class Elsewhere(dist.Store):
        host = "node-0"

    group(1, 2, Elsewhere())
    assert identify({}).nodes == 2


def test_a_connect_before_torch_distributed_is_told_once_that_is_initialised(
    group: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """Started by spawn no process has variables, so each takes itself for a job of its own."""
    warn_of_a_later_group(0, 1)
    assert not caplog.records
    group(1, 2)
    warn_of_a_later_group(1, 2)
    assert not caplog.records
    for _ in range(2):
        warn_of_a_later_group(0, 1)
    (record,) = caplog.records
    assert "rank 1 of 2, but it was initialised after connect(), so it reports as rank 0 of 1" in record.getMessage()


@given(_VALUES)
def test_a_job_s_name_makes_run_ids_whatever_it_is(name: str) -> None:
    """``--rdzv-id`` may be anything."""
    assert is_run_id(fresh_run_id(name))
    assert fresh_run_id(name) != fresh_run_id(name)
