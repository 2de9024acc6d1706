"""Ranks that report through the agent of their machine: what it passes on, what it sees, and that it owns nothing."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.messages import Ack, Counts, Doing, Farewell, Goodbye, Hello, NumberedBatch, Sign
from swanlab_ray.observer.agent import starting
from swanlab_ray.observer.agent.frames import Ingest, Opening, Stream, decoded, encoded, told
from swanlab_ray.observer.agent.link import AgentLink
from swanlab_ray.observer.agent.meeting import Meeting
from swanlab_ray.observer.agent.onward import ToWriter
from swanlab_ray.observer.agent.serving import Server
from swanlab_ray.observer.job.identity import Identity
from swanlab_ray.observer.transport.link import Hopeless, LinkBroken, NotNow, RunOver
from tests.conftest import Launch, SharedCluster, wait_until
from tests.incarnations import Cluster, Link, logged_in, mortal, rank, settings_for

COUNTS = Counts(logged=5, spooled=1, dropped={"no room": 2}, refused=3)
HELLO = Hello(
    rank=1, world_size=2, local_rank=1, host="h", pid=7, pid_namespace="p", life="l", next_seq=3, settings={"a": 1.5}
)
SAID = [
    Opening(HELLO, "run", {"project": "p", "api_key": "k"}),
    Ingest(Sign(1, "l", COUNTS, Doing(4, "a > b", 0.5), 9), NumberedBatch(2, 10, b"\x00\xff")),
    Ingest(Sign(1, "l", COUNTS), None),
    Goodbye(rank=1, life="l", state="crashed", error="boom", ended_ns=4, counts=COUNTS, sent_ns=5),
    Ack(1, 2, 0.2, ["sentence"], 3),
    Farewell(True, [], 2),
]
"""One of each kind of body."""


@pytest.fixture
def streams() -> Iterator[tuple[Stream, Stream]]:
    one, other = socket.socketpair()
    both = Stream(one, 5.0), Stream(other, 5.0)
    yield both
    for stream in both:
        stream.close()


@pytest.mark.parametrize("body", SAID, ids=lambda body: type(body).__name__)
def test_what_is_said_arrives_as_it_was(body: Any, streams: tuple[Stream, Stream]) -> None:
    streams[0].send(encoded(7, "what", body))
    frame = streams[1].receive(5.0)
    assert frame is not None
    assert (frame.number, frame.what, decoded(frame.body, type(body))) == (7, "what", body)
    assert streams[1].receive(0.0) is None


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=20), st.integers(1, 50))
def test_frames_come_apart_as_they_were_put_together(bodies: list[bytes], piece: int) -> None:
    one, other = socket.socketpair()
    stream = Stream(other, 5.0)
    data = b"".join(encoded(number, "", body) for number, body in enumerate(bodies))

    def send() -> None:
        for start in range(0, len(data), piece):
            one.sendall(data[start : start + piece])
        one.close()

    sender = threading.Thread(target=send)
    sender.start()
    received = [stream.receive(5.0) for _ in bodies]
    assert [decoded(frame.body, bytes) for frame in received if frame is not None] == bodies
    with pytest.raises(EOFError):
        stream.receive(5.0)
    sender.join()
    stream.close()


def test_settings_arrive_with_their_secrets(tmp_path: Path) -> None:
    webhook = "https://open.feishu.cn/open-apis/bot/v2/hook/a-b"
    settings = settings_for(tmp_path, api_key="key", lark_webhook_url=webhook, alerts=("loss > 1",), rank_series="all")
    assert ObserverSettings(**told(settings)) == settings


@pytest.fixture
def places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root of agents' directories, instead of this machine's."""
    root = Path(os.path.realpath(tmp_path_factory.mktemp("a"))) / "ours"
    monkeypatch.setattr("swanlab_ray.observer.ray_cluster.directories.roots", lambda: [root])
    monkeypatch.setattr("swanlab_ray.observer.ray_cluster.directories.SOCKET_PATH_BYTES", 1000)
    return root


class InThisProcess:
    """An agent whose links lead to a writer in this process, and which can be killed."""

    def __init__(self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster = cluster
        self.links: list[Link] = []
        self.gone: list[int] = []
        self._listening: socket.socket | None = None
        monkeypatch.setattr(starting.Agent, "_start", lambda agent, deadline: self._start(agent))
        monkeypatch.setattr(starting.Agent, "_ended", lambda agent: self._listening is None)

    def _start(self, agent: starting.Agent) -> None:
        if self._listening is None:
            path = agent.directory / "socket"
            path.unlink(missing_ok=True)
            self._listening = Server(path, self._onward).listening

    def _onward(self, opening: Opening, stream: Stream, afar: bool) -> ToWriter:
        noted = self.gone

        class Noting(Link):
            def tell_gone(self, rank: int, life: str) -> None:
                noted.append(rank)

        link = Noting(self.cluster)
        self.links.append(link)
        return ToWriter(link, opening, stream)

    def kill(self) -> None:
        """With all its connections."""
        assert self._listening is not None
        path = self._listening.getsockname()
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._listening = None
        for stream in list(_streams):
            if stream.socket.fileno() >= 0 and stream.socket.getsockname() == path:
                stream.socket.shutdown(socket.SHUT_RDWR)


_streams: list[Stream] = []


@pytest.fixture
def agent(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InThisProcess:
    mortal(monkeypatch)
    made = Stream.__init__

    def noting(stream: Stream, *arguments: Any) -> None:
        _streams.append(stream)
        made(stream, *arguments)

    monkeypatch.setattr(Stream, "__init__", noting)
    return InThisProcess(Cluster(settings_for(tmp_path)), monkeypatch)


def agent_link(agent: InThisProcess) -> AgentLink:
    run_id = agent.cluster.settings.run_id or ""
    return AgentLink(agent.cluster.settings, run_id, Meeting(Identity(0, 1, 0, 1), run_id))


def test_events_arrive_once_whatever_is_killed_or_lost(agent: InThisProcess) -> None:
    """The agent, the writer, and answers."""
    observers = [rank(agent.cluster, agent_link(agent), number, 2) for number in range(2)]
    for step in range(60):
        for observer in observers:
            observer.log({"x": step}, step)
        if step % 10 == 5:
            assert all(observer.flush(30) for observer in observers)
            agent.links[-1].lose_answers = 2
        if step % 20 == 10:
            agent.kill()
        if step % 20 == 15:
            agent.cluster.kill()
    finishing = [threading.Thread(target=observer.finish) for observer in observers]
    for thread in finishing:
        thread.start()
    for thread in finishing:
        thread.join(60)
    there = [(number, step) for number, step, _ in logged_in(agent.cluster.files)]
    assert sorted(there) == [(number, step) for number in range(2) for step in range(60)]
    assert len(agent.links) >= 2
    assert not agent.gone


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (RunOver("it has ended"), RunOver),
        (Hopeless("never"), Hopeless),
        (NotNow("another one"), NotNow),
        (ValueError("odd"), LinkBroken),
    ],
)
def test_what_went_wrong_is_told_as_what_it_is(
    raised: Exception, kind: type[Exception], agent: InThisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(link: Link, hello: Hello) -> Ack:
        raise raised

    monkeypatch.setattr(Link, "open", fails)
    link = agent_link(agent)
    with pytest.raises(LinkBroken, match=str(raised)) as caught:
        link.open(HELLO)
    assert type(caught.value) is kind
    link.close(over=False)


def test_a_process_that_ends_without_a_word_is_told_at_once(agent: InThisProcess) -> None:
    """Though one that it has forked holds its socket still; one that only leaves is no matter."""
    link, hello = agent_link(agent), HELLO.model_copy(update={"settings": None})
    link.open(hello)
    link.close(over=False)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        agent_link(agent).open(hello.model_copy(update={"rank": 0, "life": "other"}))
        if os.fork() == 0:
            os.read(reader, 1)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    wait_until(lambda: agent.gone == [0], 30, "its end is told")
    os.write(writer, b".")
    os.close(reader)
    os.close(writer)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_another_user_is_not_listened_to(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = Path("/tmp", f"open-{os.getpid()}")
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    made: list[Any] = []

    def onward(opening: Opening, stream: Stream, afar: bool) -> ToWriter:
        made.append(opening)
        raise AssertionError

    listening = Server(directory / "socket", onward).listening
    (directory / "socket").chmod(0o777)
    try:
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            one = socket.socket(socket.AF_UNIX)
            one.connect(str(directory / "socket"))
            try:
                one.sendall(encoded(1, "open", SAID[0]))
                closed = one.recv(1) == b""
            except OSError:
                closed = True
            os._exit(0 if closed else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not made
    finally:
        listening.close()
        (directory / "socket").unlink()
        directory.rmdir()


# Real agents.


def processes_of(run_id: str) -> list[int]:
    """Of agents of a run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if starting.AGENT.encode() in arguments and arguments[-2].endswith(f"/{run_id}".encode()):
                found.append(int(entry.name))
    return found


LOGGING = """
    import os, sys, time
    from pathlib import Path
    from swanlab_ray.observer import connect
    from swanlab_ray.observer.agent import starting
    from swanlab_ray.observer.transport import link, window
    link.CALL_DEADLINE_S = window.CALL_DEADLINE_S = 3.0
    starting.STOPPED_S = 1.0
    observer = connect()
    for step in range(30):
        observer.log({"x": step}, step)
        if step == 10:
            assert observer.flush(600)
            Path("ready").touch()
            while not Path("go").exists():
                time.sleep(0.01)
    print("finished", observer.finish(), "ray" in sys.modules, observer.statistics())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.takes(20)
def test_an_agent_that_is_gone_costs_nothing(
    number: signal.Signals, launch: Launch, tmp_path: Path, in_cluster: SharedCluster
) -> None:
    """Its ranks start another one, and send again what was not acknowledged."""
    run_id = f"gone-{number.name}-{os.getpid()}"
    job = launch(LOGGING, ranks=2, OBSERVER_RUN_ID=run_id)
    wait_until(lambda: (tmp_path / "ready").exists(), 120, "the first values are there")
    (first,) = processes_of(run_id)
    os.kill(first, number)
    (tmp_path / "go").touch()
    done = job.wait()
    assert done.code == 0, done.output
    assert len(re.findall(r"finished True False .*logged=30, acknowledged=30, spooled=0", done.output)) == 2, (
        done.output
    )
    (run,) = find_runs([tmp_path / "swanlog"])
    there = [(number, step) for number, step, _ in logged_in(run)]
    assert sorted(there) == [(number, step) for number in range(2) for step in range(30)]
    wait_until(lambda: processes_of(run_id) == [], 60, "no agent is left")


OTHER_VERSION = """
    import sys, time
    import ray
    from swanlab_ray.observer.ray_cluster.patches import be_patient, leave_out_what_idles
    be_patient()
    leave_out_what_idles(dashboard=False)
    ray.__version__ = "9.9.9"
    context = ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    print("address", context.address_info["gcs_address"], flush=True)
    time.sleep(600)
"""


@pytest.mark.takes(20)
def test_a_cluster_of_another_version_is_told_or_left_alone(launch: Launch, tmp_path: Path) -> None:
    """Left alone where it only runs on this machine: the run gets a cluster of its own. Told where it was named."""
    other = launch(OTHER_VERSION, ranks=0)
    wait_until(lambda: "address" in other.output(), 120, "a cluster")
    address = re.search("address (.*)", other.output())[1]  # type: ignore[index]
    noted = tmp_path / "noted" / "ray" / "ray_current_cluster"
    noted.parent.mkdir(parents=True)
    noted.write_text(address)
    script = """
        from swanlab_ray.observer import connect
        observer = connect()
        observer.log({"x": 1.0}, 0)
        print("finished", observer.finish(timeout=60))
    """
    done = launch(script, ranks=0, RAY_TMPDIR=str(noted.parent.parent), RAY_AUTH_MODE="disabled").wait()
    assert "finished True" in done.output, done.output
    named = launch(script.replace("60", "10"), ranks=0, RAY_ADDRESS=address).wait()
    assert "finished False" in named.output
    assert re.search("could not be joined: .*mismatch.*9.9.9", named.output), named.output
