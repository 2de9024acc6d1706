from __future__ import annotations

import pytest

from swanlab_ray.actors.settings import ObserverSettings, SettingsError
from swanlab_ray.observer.job.identity import Identity, check_run_id, identify, resolve_run_id, which_launch

ONE = Identity(0, 1, 0, 1)
TWO = Identity(0, 2, 0, 1)


def settings(**values: object) -> ObserverSettings:
    return ObserverSettings(project="p", **values)


@pytest.mark.parametrize(
    ("env", "identity"),
    [
        ({}, ONE),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Identity(5, 8, 1, 2, node=1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
          "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, Identity(1, 2, 1, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
         Identity(3, 4, 1, 2, node=1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}, Identity(5, 8, 1, 2, node=1)),
        # Set by hand: it may be eight machines.
        ({"RANK": "5", "WORLD_SIZE": "8"}, Identity(5, 8, 0, 8, node=5)),
        # A batch script is not one of the tasks it will start.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, ONE),
    ],
)  # fmt: skip
def test_identity_of_each_launcher(env: dict[str, str], identity: Identity) -> None:
    assert identify(env) == identity


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"^RANK=2 does not fit WORLD_SIZE=2: ranks go from 0 to 1\.$"),
        ({"RANK": "two", "WORLD_SIZE": "2"}, r"^RANK='two' is not a number: unset it"),
    ],
)
def test_contradicting_launcher_is_refused(env: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        identify(env)


def test_explicit_run_id_wins() -> None:
    assert resolve_run_id(settings(run_id="mine"), TWO, {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}) == "mine"


def test_slurm_step_is_the_job_and_array_tasks_differ() -> None:
    env = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_CLUSTER_NAME": "alps"}
    assert resolve_run_id(settings(), TWO, env) == "slurm-alps-77.0"
    array = env | {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}
    assert resolve_run_id(settings(), TWO, array) == "slurm-alps-70_3.0"
    assert resolve_run_id(settings(), TWO, env | {"SLURM_STEP_ID": "1"}) == "slurm-alps-77.1"


def test_mpi_namespace_is_the_job() -> None:
    assert resolve_run_id(settings(), TWO, {"PMIX_NAMESPACE": "prterun-host-42@1"}) == "mpi-prterun-host-42-1"


def test_single_processes_never_share() -> None:
    assert resolve_run_id(settings(), ONE, {}) != resolve_run_id(settings(), ONE, {})


def test_ranks_agree_through_the_agent_s_store_and_jobs_do_not() -> None:
    """Same TORCHELASTIC_RUN_ID, as with a static rendezvous: what tells jobs apart is the agent's store."""
    from torch.distributed import TCPStore

    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(2)]
    ids: list[str] = []
    for store in stores:
        env = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}
        env["MASTER_PORT"] = str(store.port)
        check_run_id(settings(), TWO, env)
        of_ranks = {resolve_run_id(settings(), TWO, env) for _ in range(3)}
        assert len(of_ranks) == 1
        ids += of_ranks
        named = resolve_run_id(settings(), TWO, env | {"TORCHELASTIC_RUN_ID": "later"})
        assert named in of_ranks  # a restart of the workers finds the id of the first attempt
    assert ids[0] != ids[1]


def test_a_job_that_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(SettingsError, match="set OBSERVER_RUN_ID to one value for all of its ranks"):
        check_run_id(settings(), TWO, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"})


def test_a_restart_is_the_same_job_at_a_higher_attempt() -> None:
    from torch.distributed import TCPStore

    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(2)]
    env = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}
    first, again, other = (
        which_launch(env | {"MASTER_PORT": str(store.port), "TORCHELASTIC_RESTART_COUNT": count})
        for store, count in ((stores[0], "0"), (stores[0], "2"), (stores[1], "0"))
    )
    assert first.nonce == again.nonce != other.nonce
    assert (first.attempt, again.attempt, other.attempt) == (0, 2, 0)


def test_what_a_launcher_does_not_tell_is_left_open() -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert which_launch({}) == ("", 0)
    assert which_launch({"RANK": "0", "WORLD_SIZE": "2"}) == ("", 0)
    assert which_launch(slurm | {"SLURM_RESTART_COUNT": "1"}) == ("slurm-7.0", 1)
    assert which_launch(slurm | {"SLURM_RESTART_COUNT": "soon"}) == ("slurm-7.0", 0)


def test_a_store_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swanlab_ray.observer.job.identity.STORE_DEADLINE_S", 0.2)
    env = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert which_launch(env | {"TORCHELASTIC_RESTART_COUNT": "1"}) == ("", 1)
