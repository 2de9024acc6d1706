"""Directories of agents: whatever else lies there stays, and an agent finds a place where this machine has one. What it
does that cannot start."""

from __future__ import annotations

import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from swanlab_ray.actors.wire.locks import hold_lock, holder, nobody_holds, release_lock
from swanlab_ray.observer.agent import private, starting
from swanlab_ray.observer.agent import process as agent_process
from swanlab_ray.observer.agent.onward import Unstarted
from swanlab_ray.observer.ray_cluster import directories
from swanlab_ray.observer.ray_cluster.addresses import NoCluster
from tests.conftest import wait_until

HOLD = """
import sys, time
from swanlab_ray.actors.wire.locks import hold_lock
hold_lock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two roots, instead of those of this machine, in which other clusters lie."""
    roots = [tmp_path / "first" / "ours", tmp_path / "second" / "ours"]
    for root in roots:
        root.parent.mkdir()
    monkeypatch.setattr(directories, "roots", lambda: roots)
    monkeypatch.setattr(directories, "SOCKET_PATH_BYTES", 1000)
    return roots


@pytest.fixture
def other_process() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait(60)


def _old(path: Path) -> Path:
    os.utime(path, (time.time() - 600, time.time() - 600), follow_symlinks=False)
    return path


def _held_elsewhere(lock: Path, started: list[subprocess.Popen[str]]) -> int:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process.pid


def test_sweeping_removes_only_what_was_made_here(places: list[Path], tmp_path: Path) -> None:
    """Strange files, links, directories without our mark and new ones stay, and disturb nothing; unused ones go."""
    root = places[0]
    left = _old(directories.directory_for("left"))
    session = _old(directories.new_session(root))
    new = directories.directory_for("new")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "checkpoint").touch()
    (precious / directories.MARK).touch()
    foreign = root / "foreign"
    foreign.mkdir()
    link = root / "link"
    link.symlink_to(precious)
    stray = root / "core.1234"
    stray.touch()
    pipe = root / ".nfs0001"
    os.mkfifo(pipe)
    for path in (precious, foreign, link, stray, pipe):
        _old(path)

    directories.sweep(root)

    assert not left.exists()
    assert not session.exists()
    assert sorted(path.name for path in root.iterdir()) == [".nfs0001", "core.1234", "foreign", "link", "new"]
    assert new.is_dir()
    assert (precious / "checkpoint").exists()


@pytest.mark.parametrize("lock", directories.LOCKS)
def test_what_another_process_uses_stays_however_old(
    lock: str, places: list[Path], other_process: list[subprocess.Popen[str]]
) -> None:
    """Locks tell who lives, since process ids may be those of another container."""
    places[0].mkdir(mode=0o700)
    path = directories.new_session(places[0])
    pid = _held_elsewhere(path / lock, other_process)
    directories.sweep(places[0])
    _old(path)
    directories.sweep(places[0])
    assert path.exists()
    assert holder(str(path / lock)) == pid
    other_process[0].kill()
    other_process[0].wait(60)
    directories.sweep(places[0])
    assert not path.exists()


def test_looking_at_a_lock_of_our_own_keeps_it(tmp_path: Path, other_process: list[subprocess.Popen[str]]) -> None:
    """A record lock goes when its process closes any descriptor of the file, so it is not opened again."""
    path = tmp_path / "lock"
    descriptor = hold_lock(str(path))
    look = "import sys; from swanlab_ray.actors.wire.locks import nobody_holds; sys.exit(nobody_holds(sys.argv[1]))"
    assert not nobody_holds(str(path))
    assert not nobody_holds(str(path))
    assert subprocess.run([sys.executable, "-c", look, path]).returncode == 0  # somebody does
    release_lock(descriptor)
    assert nobody_holds(str(path))


def test_a_root_is_swept_only_where_it_is_this_user_s_alone(places: list[Path]) -> None:
    root = places[0]
    left = _old(directories.directory_for("left"))
    root.chmod(0o755)
    directories.sweep(root)
    assert left.exists()
    assert not directories.made_here(left)


@pytest.mark.parametrize("run_id", [".", "..", "...", "", "a/b", "../other", "a\0b"])
def test_a_directory_lies_directly_below_its_root(run_id: str, places: list[Path]) -> None:
    with pytest.raises(NoCluster, match="is no name of a directory"):
        directories.directory_for(run_id)
    assert not places[0].exists()


@pytest.mark.parametrize(("run_id", "name"), [("r12", "r12+"), ("r12-ab", "r12-ab+"), ("run", "run"), ("r1x", "r1x")])
def test_a_run_never_has_the_directory_of_a_session(run_id: str, name: str, places: list[Path]) -> None:
    """Run ids have no plus sign."""
    assert directories.directory_for(run_id).name == name


@pytest.mark.parametrize("wrong", ["read-only", "full", "open to others", "a link", "a file", "long"])
def test_where_the_first_place_cannot_be_used_the_next_is(
    wrong: str, places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = places
    if wrong == "read-only":
        make = directories._make_directory

        def refuse(path: Path) -> None:
            if path == first:
                raise OSError(30, "Read-only file system")
            make(path)

        monkeypatch.setattr(directories, "_make_directory", refuse)
    elif wrong == "full":
        space = os.statvfs
        free = {"f_bavail": 1, "f_frsize": 4096}
        monkeypatch.setattr(os, "statvfs", lambda at: type("Space", (), free)() if Path(at) == first else space(at))
    elif wrong == "open to others":
        first.mkdir(mode=0o755)
        first.chmod(0o755)
    elif wrong == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        first.symlink_to(tmp_path / "elsewhere")
    elif wrong == "a file":
        first.touch()
    else:
        places[0] = first = tmp_path / "first" / ("l" * 200)
        monkeypatch.setattr(directories, "SOCKET_PATH_BYTES", len(str(second)) + 100)
    assert directories.directory_for("run") == second / "run"
    assert directories.directory_for("run") == second / "run"
    if wrong != "a file":
        assert not (first / "run").exists()


def test_ranks_follow_the_one_that_came_first(
    places: list[Path], monkeypatch: pytest.MonkeyPatch, other_process: list[subprocess.Popen[str]]
) -> None:
    """A first place that becomes usable while the run goes on does not part its ranks."""
    first = places[0]
    first.mkdir(mode=0o755)
    first.chmod(0o755)
    directory = directories.directory_for("run")
    _held_elsewhere(directory / "alive", other_process)
    first.chmod(0o700)
    assert directories.directory_for("run") == directory
    assert directories.directory_for("another").parent == first


def test_without_any_place_one_sentence_names_them_all(places: list[Path]) -> None:
    for root in places:
        root.touch()
    with pytest.raises(NoCluster) as caught:
        directories.directory_for("run")
    sentence = str(caught.value)
    assert all(str(root.parent) in sentence for root in places)
    assert "set TMPDIR to a directory" in sentence
    assert "\n" not in sentence


def test_roots_are_named_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/scratch/")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    name = f"swanlab-ray-{os.getuid()}"
    assert [str(root) for root in directories.roots()] == [
        f"/tmp/{name}",
        f"/scratch/{name}",
        f"/var/tmp/{name}",
        f"/dev/shm/{name}",
    ]


def test_a_socket_fits_below_the_longest_root(tmp_path: Path) -> None:
    """The name of a user with the highest number, in the place that all machines have."""
    longest = "/tmp/swanlab-ray-4294967294" + directories.RAYS_PATH.format(4194304)
    assert len(longest) <= directories.SOCKET_PATH_BYTES


def test_sessions_of_one_process_id_are_two(places: list[Path]) -> None:
    """Two containers that share /tmp each have a process 4."""
    directories.directory_for("run")
    assert len({directories.new_session(places[0]) for _ in range(3)}) == 3


def test_a_directory_is_put_away_only_while_nobody_uses_it(
    places: list[Path], other_process: list[subprocess.Popen[str]]
) -> None:
    directory = directories.directory_for("run")
    _held_elsewhere(directory / "alive", other_process)
    assert directories.put_away(directory) is None
    assert directory.is_dir()
    other_process[0].kill()
    other_process[0].wait(60)
    away = directories.put_away(directory)
    assert away is not None
    assert not directory.exists()


STUCK = """
import sys, time, subprocess
from pathlib import Path
from swanlab_ray.observer.agent import private
from swanlab_ray.observer.ray_cluster import directories
directories.roots = lambda: [Path(sys.argv[1]).parent]

class Stuck(private.Cluster):
    def _init(self, dashboard):
        print(self.session, subprocess.Popen(["sleep", "60"]).pid, flush=True)
        time.sleep(60)

Stuck(Path(sys.argv[1]), lambda why: print(why, flush=True)).start(dashboard=False, deadline=1.0)
"""


def test_a_cluster_that_does_not_start_is_given_up_with_the_reason(
    places: list[Path], other_process: list[subprocess.Popen[str]]
) -> None:
    """The agent ends itself and what it has started, though the call it waits in never returns."""
    directory = directories.directory_for("run")
    stuck = subprocess.Popen([sys.executable, "-c", STUCK, str(directory)], stdout=subprocess.PIPE, text=True)
    other_process.append(stuck)
    _held_elsewhere(directory / "alive", other_process)
    assert stuck.stdout is not None
    session, child = stuck.stdout.readline().split()
    assert stuck.stdout.read() == "it did not start within 1 s\n"
    assert stuck.wait(60) == 1
    assert not Path(session).exists()
    wait_until(lambda: not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text())


def test_an_agent_gives_up_when_nobody_waits_or_a_process_of_its_has_ended(
    places: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up: list[str] = []
    monkeypatch.setattr(private, "GRACE_S", 0.0)
    monkeypatch.setattr(private, "POLL_S", 0.01)
    directory = directories.directory_for("run")

    class Watched(private.Cluster):
        def _give_up(self, why: str) -> None:
            given_up.append(why)
            self._started.set()

    Watched(directory, print)._watch(60.0)
    monkeypatch.setattr(private, "_dead_children", lambda: ["gcs_server"])
    Watched(directory, print)._watch(60.0)
    Watched(directory, print).check()
    assert given_up == [
        "nobody waits for it any more",
        "gcs_server has ended while the cluster started",
        "gcs_server has ended",
    ]


def test_those_that_wait_are_told_without_a_log_and_the_log_holds_no_secret(
    places: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as on a full disk."""
    directory = directories.directory_for("run")
    secret = "https://open.feishu.cn/open-apis/bot/v2/hook/11111111-2222-3333-4444-555555555555"
    agent_process.Agent(directory, 0, dashboard=False)._give_up(f"no answer from {secret}")
    said = capsys.readouterr().err
    assert said.startswith("no answer from ")
    assert secret not in said
    monkeypatch.setattr(sys, "stderr", None)
    waiting = agent_process.Agent(directory, 0, dashboard=False)
    waiting._give_up("it did not start")
    with pytest.raises(Unstarted, match="it did not start"):
        waiting.connect(may_start=True)


@pytest.fixture
def agent(places: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[starting.Agent]:
    """Of a run, not started."""
    monkeypatch.setattr(starting, "_failures", {})
    agent = starting.Agent("run", dashboard=False)
    yield agent
    agent.leave(over=False)


def test_a_rank_tries_again_later_where_a_cluster_could_not_be_started(agent: starting.Agent) -> None:
    told = agent.failed("gcs_server has ended")
    assert re.search(r"could not be started: gcs_server has ended; see .*agent\.log", told)
    with pytest.raises(NoCluster, match=r"could not be started, 1 times: see .*agent\.log"):
        agent.connect(lambda: math.inf)


def test_an_agent_that_ends_at_once_is_told(agent: starting.Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "AGENT", "swanlab_ray.no_such_module")
    with pytest.raises(NoCluster, match=r"could not be started: the observer's agent has ended; see .*agent\.log"):
        agent.connect(lambda: math.inf)
    with pytest.raises(NoCluster, match="could not be started, 1 times"):  # not again at once
        agent.connect(lambda: math.inf)
    assert "No module named swanlab_ray.no_such_module" in agent.log.read_text()


def test_a_directory_that_was_removed_is_made_again(agent: starting.Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "AGENT", "swanlab_ray.no_such_module")
    shutil.rmtree(agent.directory)
    with pytest.raises(NoCluster, match="has ended"):
        agent.connect(lambda: math.inf)
    assert agent.log.exists()


def test_a_rank_that_was_stopped_while_it_starts_the_agent_holds_up_nobody_for_long(
    agent: starting.Agent, other_process: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "STARTED_S", 0.1)
    lock = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(); time.sleep(60)"
    command = [sys.executable, "-uc", lock, str(agent.directory / "starting")]
    starter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    other_process.append(starter)
    assert starter.stdout is not None
    assert starter.stdout.readline()
    with pytest.raises(NoCluster, match="Another rank is starting the observer's agent, and was stopped"):
        agent.connect(lambda: math.inf)


@pytest.mark.parametrize("run_id", ["x" * 64, "\u4e2d" * 64, "r1-ff"])
def test_a_socket_fits_whatever_the_run_is_called(run_id: str) -> None:
    """Below the longest root that is used."""
    root = directories.SOCKET_PATH_BYTES - len(directories.RAYS_PATH.format(4194304))
    assert root + len(f"/{directories._name(run_id)}/socket".encode()) <= directories.SOCKET_PATH_BYTES
    assert directories._name(run_id) != directories._name(run_id + "y")


def test_a_rank_that_ends_waits_for_no_agent(agent: starting.Agent, other_process: list[subprocess.Popen[str]]) -> None:
    _held_elsewhere(agent.directory / "agent", other_process)
    with pytest.raises(NoCluster, match="had not started yet"):
        agent.connect(lambda: 0.0)


def test_an_agent_that_never_answers_is_ended(
    agent: starting.Agent, monkeypatch: pytest.MonkeyPatch, other_process: list[subprocess.Popen[str]]
) -> None:
    """The next one is started then. A process that only holds the lock is left alone."""
    monkeypatch.setattr(starting, "START_DEADLINE_S", 0.0)
    pid = _held_elsewhere(agent.directory / "agent", other_process)
    assert agent._pid() is None
    with pytest.raises(NoCluster, match="was ended"):
        agent.connect(lambda: math.inf)
    assert other_process[0].poll() is None
    monkeypatch.setattr(starting.Agent, "_pid", lambda self: pid)
    with pytest.raises(NoCluster, match="was ended"):
        agent.connect(lambda: math.inf)
    assert other_process[0].wait(60) == -9


def test_leaving_an_agent_lets_it_end(agent: starting.Agent) -> None:
    """While others, a fork's child included, hold their own locks; and a process may come back."""
    alive = agent.directory / "alive"
    starting._hold(alive)
    starting._hold(alive)
    assert not nobody_holds(str(alive))
    child = os.fork()
    if child == 0:
        starting._hold(alive)  # its own
        agent.leave(over=False)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not nobody_holds(str(alive))
    agent.leave(over=True)
    assert nobody_holds(str(alive))
    assert (alive.parent / "over").exists()
    starting._hold(alive)
    assert not nobody_holds(str(alive))


def test_a_cluster_in_a_file_system_without_sockets_is_not_tried(
    places: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoSockets(socket.socket):
        def bind(self, address: object) -> None:
            if str(places[0]) in str(address):
                raise OSError(95, "Operation not supported")
            super().bind(address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "socket", NoSockets)
    assert directories.directory_for("run").parent == places[1]
