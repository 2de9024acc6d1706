"""``connect()`` in the places that people call it from, and which run it begins. The writers are in this process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.settings import ObserverSettings, SettingsError
from swanlab_ray.observer import session
from swanlab_ray.observer.job import which_run
from swanlab_ray.observer.job.identity import Identity, resolve_run_id
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.session import connect
from swanlab_ray.observer.unobserved import DisabledObserver
from tests import incarnations
from tests.swanlab_file import read_run, run_dirs

SHELL = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
"""What ``srun --pty bash`` leaves in the environment of everything that is started there."""
TWO_TASKS = SHELL | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}

Program = Callable[..., str]


@pytest.fixture(autouse=True)
def _new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    which_run.forget_runs()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    yield
    if (left := session.current()) is not None:
        left.finish(timeout=0)


@pytest.fixture
def writers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, incarnations.Cluster]:
    """A writer for each run id, where Ray would be; with the parameter True each with SwanLab's own files."""
    incarnations.mortal(monkeypatch, swanlab=getattr(request, "param", False))
    found: dict[str, incarnations.Cluster] = {}

    def link(settings: ObserverSettings, identity: Identity) -> incarnations.Link:
        run_id = resolve_run_id(settings, identity)
        named = settings.model_copy(update={"run_id": run_id})
        cluster = found.setdefault(run_id, incarnations.Cluster(named))
        cluster.kill()  # the writer of a run that has ended ends as well
        return incarnations.Link(cluster)

    monkeypatch.setattr(session, "RankLink", link)
    return found


@pytest.fixture
def program(writers: dict[str, incarnations.Cluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Run a program of one rank that logs one value; returns its run id."""

    def run(environment: dict[str, str], value: float, log_dir: Path = tmp_path / "log") -> str:
        which_run.forget_runs()  # as a new process
        for name, word in environment.items():
            monkeypatch.setenv(name, word)
        with connect(project="p", mode="offline", log_dir=log_dir, node_interval=0) as observer:
            observer.log({"x": value}, 0)
            assert observer.wait_ready(60)
        assert observer.run_id is not None
        return observer.run_id

    return run


def values(log_dir: Path) -> dict[str, list[float]]:
    """What each run holds of ``x``."""
    return {run.run_id: [logged["x"] for _, _, logged in incarnations.logged_in(run)] for run in find_runs([log_dir])}


def test_programs_of_one_interactive_slurm_shell_are_a_run_each(program: Program, tmp_path: Path) -> None:
    first, second = program(SHELL, 1.0), program(SHELL, 2.0)
    assert second == f"{first}-2"
    assert first.startswith("slurm-77.0-")
    assert values(tmp_path) == {first: [1.0], second: [2.0]}
    elsewhere = program(SHELL, 3.0, tmp_path / "other")
    assert elsewhere not in (first, second)  # in the cloud they would be one experiment


@pytest.mark.parametrize("writers", [True], indirect=True)
def test_a_second_program_leaves_the_first_one_s_swanlab_run_alone(program: Program, tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        program(SHELL, value)
    kept = [read_run(path).scalars for path in run_dirs(tmp_path / "log")]
    assert sorted(kept, key=str) == [{"x": {0: 1.0}}, {"x": {0: 2.0}}]


def test_a_job_that_is_queued_again_goes_on_with_its_runs_in_their_order(program: Program, tmp_path: Path) -> None:
    first, second = program(SHELL, 1.0), program(SHELL, 2.0)
    again = SHELL | {"SLURM_RESTART_COUNT": "1"}
    assert [program(again, 3.0), program(again, 4.0), program(again, 5.0)] == [first, second, f"{first}-3"]
    assert values(tmp_path)[first] == [1.0, 3.0]


def test_a_run_id_that_is_set_is_the_run_of_every_program(program: Program) -> None:
    assert {program(SHELL | {"OBSERVER_RUN_ID": "mine"}, value) for value in (1.0, 2.0)} == {"mine"}


@pytest.mark.parametrize("launched", [TWO_TASKS, {"PMIX_NAMESPACE": "prterun-1@1"}], ids=["srun", "mpirun"])
def test_ranks_of_a_second_program_in_one_step_agree_on_the_second_run(
    launched: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ``srun -n2 bash -c "a; b"``. Each rank says its number without asking another."""
    for name, word in launched.items():
        monkeypatch.setenv(name, word)
    settings = ObserverSettings(project="p", log_dir=tmp_path)
    ids = []
    for _ in range(2):
        for rank in range(2):
            which_run.forget_runs()
            place = Identity(rank, 2, rank, 1, run=which_run.which_run(settings, Identity(rank, 2, rank, 1)))
            ids.append(resolve_run_id(settings, place))
    assert ids[0] == ids[1] != ids[2] == ids[3] == f"{ids[0]}-2"


def test_programs_that_are_started_at_once_never_share_a_number(tmp_path: Path) -> None:
    taken: list[int | None] = []
    threads = [
        threading.Thread(target=lambda: taken.append(which_run.next_in_step(tmp_path, "slurm-1.0", 0, {})))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number or 0 for number in taken) == list(range(1, 21))


def test_where_programs_cannot_be_told_apart_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "observer").write_text("in the way")
    assert which_run.next_in_step(tmp_path, "slurm-1.0", 0, {}) is None
    assert "cannot be told apart here" in caplog.text
    assert "give each an OBSERVER_RUN_ID of its own" in caplog.text


def test_each_connect_after_a_finish_begins_a_run_that_all_ranks_agree_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folds in one torchrun job. A restart begins with the first fold again, and so goes on with its run."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    settings = ObserverSettings(project="p", log_dir=tmp_path)

    def folds(rank: int) -> list[str]:
        which_run.forget_runs()  # each rank is a process
        places = [Identity(rank, 2, rank, 1) for _ in range(3)]
        numbers = [which_run.which_run(settings, place) for place in places]
        return [resolve_run_id(settings, Identity(rank, 2, rank, 1, run=number)) for number in numbers]

    first, second = folds(0), folds(1)
    assert first == second == folds(0)
    assert first[1:] == [f"{first[0]}-2", f"{first[0]}-3"]


def test_a_run_id_of_the_user_s_is_continued_and_that_is_said(
    writers: dict[str, incarnations.Cluster], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ObserverSettings(project="p", mode="offline", log_dir=tmp_path, run_id="mine", node_interval=0)
    for value in (1.0, 2.0):
        assert "is continued now" not in caplog.text
        with connect(settings) as observer:
            observer.log({"x": value}, 0)
            assert observer.wait_ready(60)
    assert caplog.text.count("Run 'mine' was finished by this process and is continued now") == 1
    assert values(tmp_path) == {"mine": [1.0, 2.0]}


def test_another_experiment_that_joins_a_run_is_told_how_to_begin_its_own(
    writers: dict[str, incarnations.Cluster], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback for each fold, each with a name of its own, and nothing is finished in between."""
    common: dict[str, Any] = {"project": "p", "mode": "offline", "log_dir": tmp_path, "node_interval": 0}
    first = connect(experiment_name="fold-0", **common)
    for fold in (1, 2):
        settings = ObserverSettings(experiment_name=f"fold-{fold}", api_key="s3cret", **common)
        assert connect(settings) is connect(settings) is first
    said = [record.getMessage() for record in caplog.records if "again with other settings" in record.getMessage()]
    assert len(said) == 2  # each once
    assert "(experiment_name='fold-1') while this process's run (fold-0) is not finished" in said[0]
    assert "For a run of its own call finish() on its observer first." in said[0]
    assert "s3cret" not in caplog.text


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, which somebody has removed."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    yield gone
    os.chdir(tmp_path)


def test_a_removed_working_directory_costs_a_sentence(nowhere: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        observer = connect(project="p", mode="offline")
        observer.log({"x": 1.0}, 0)
        assert observer.finish()
    said = [record.getMessage() for record in caplog.records if "working directory" in record.getMessage()]
    assert len(said) == 1
    assert "the training goes on. The working directory is gone, so log_dir 'swanlog' leads nowhere" in said[0]
    with pytest.raises(SettingsError, match="The working directory is gone"):
        connect(project="p", mode="offline", strict=True)
    assert not nowhere.exists()


def test_a_removed_working_directory_is_no_matter_to_a_log_dir_from_the_root(
    nowhere: Path, program: Program, tmp_path: Path
) -> None:
    run_id = program({}, 1.0)
    assert values(tmp_path) == {run_id: [1.0]}


@pytest.mark.usefixtures("writers")
def test_each_run_of_a_process_tells_its_own_troubles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        caplog.clear()
        with connect(project="p", mode="offline", log_dir=tmp_path, node_interval=0) as observer:
            observer.log({"x": object()}, 0)
            observer.log({"x": object()}, 1)
        assert caplog.text.count("'x' is not logged") == 1


@pytest.mark.usefixtures("writers")
def test_threads_that_connect_at_once_share_one_observer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Barrier(2)

    def identified() -> Identity:
        with contextlib.suppress(threading.BrokenBarrierError):  # where the other one waits, as it should
            begun.wait(0.5)
        return Identity(0, 1, 0, 1)

    monkeypatch.setattr(session, "identify", identified)
    found: list[Observer] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(connect(project="p", mode="offline", log_dir=tmp_path, node_interval=0))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert found[0] is found[1]
    finally:
        for observer in found:
            observer.finish(timeout=1)


def test_a_fork_connects_though_another_thread_was_just_connecting() -> None:
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with session._connecting:
            held.set()
            over.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        connected = connect(mode="disabled")
        os._exit(0 if isinstance(connected, DisabledObserver) else 1)
    over.set()
    other.join(30)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), OSError(24, "Too many open files")])
def test_what_nobody_expected_costs_the_observation_and_not_the_training(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(session, "Observer", fail)
    values: dict[str, Any] = {"project": "p", "mode": "offline", "log_dir": tmp_path}
    observer = connect(**values)
    assert isinstance(observer, DisabledObserver)
    assert f"This rank is not observed; the training goes on. {type(error).__name__}" in caplog.text
    with pytest.raises(type(error)):
        connect(**values, strict=True)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"},
        {"RANK": "", "WORLD_SIZE": "", "LOCAL_WORLD_SIZE": "0"},
        {"LOCAL_RANK": "1", "WORLD_SIZE": "2"},
        {"MASTER_PORT": "²", "TORCHELASTIC_USE_AGENT_STORE": "True"},
        {"TORCHELASTIC_MAX_RESTARTS": "9" * 40, "TORCHELASTIC_RESTART_COUNT": "x"},
        SHELL | {"SLURM_JOB_ID": "../..", "SLURM_STEP_ID": "a b", "SLURM_RESTART_COUNT": "../x"},
        {"PMIX_NAMESPACE": "/" * 300},
    ],
)
def test_a_rank_is_observed_whatever_a_launcher_has_left_behind(
    environment: dict[str, str], program: Program, tmp_path: Path
) -> None:
    run_id = program(environment, 1.0)
    assert values(tmp_path) == {run_id: [1.0]}
    assert not [path for path in tmp_path.rglob("*") if ".." in path.name]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"settings": {"project": "p"}}, "connect() takes an ObserverSettings, not dict"),
        ({"settings": ObserverSettings(project="p"), "mode": "local"}, "Pass either settings or keywords"),
        ({"project": "p", "run_id": "."}, "Invalid run_id '.'"),
        ({}, "No project is set"),
    ],
)
def test_wrong_settings_are_a_settings_error(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        connect(**values)  # type: ignore[arg-type]
    assert sentence in str(caught.value)


def test_a_disabled_observer_asks_nobody_for_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "y")
    observer: Observer = connect(mode="disabled")
    assert (observer.rank, observer.world_size) == (0, 1)
