"""How agents of several machines find and trust each other, and pass on what their ranks say."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from swanlab_ray.actors.wire.events import State
from swanlab_ray.actors.wire.messages import Farewell, Goodbye
from swanlab_ray.observer.agent import meeting as meeting_module
from swanlab_ray.observer.agent import reach, starting
from swanlab_ray.observer.agent import reach as reach_module
from swanlab_ray.observer.agent.frames import Frame, Opening, Stream, decoded
from swanlab_ray.observer.agent.link import AgentLink
from swanlab_ray.observer.agent.meeting import Meeting
from swanlab_ray.observer.agent.onward import ToHead, ToWriter
from swanlab_ray.observer.agent.reach import Head
from swanlab_ray.observer.agent.serving import Server
from swanlab_ray.observer.job.identity import Identity
from swanlab_ray.observer.ray_cluster.ports import ports_given
from swanlab_ray.observer.script.notices import say_again
from swanlab_ray.observer.transport.link import LinkBroken
from tests.conftest import wait_until
from tests.incarnations import Cluster, Link, logged_in, mortal, rank, settings_for


@pytest.fixture
def listening() -> Iterator[tuple[socket.socket, str]]:
    one, token = reach.listen()
    yield one, token
    one.close()


def _head(listening: tuple[socket.socket, str], token: str | None = None, *before: str) -> Head:
    port = listening[0].getsockname()[1]
    return Head([*before, f"127.0.0.1:{port}"], token or listening[1])


def _accepting(listening: tuple[socket.socket, str]) -> list[bool]:
    answers: list[bool] = []

    def accept() -> None:
        one, _ = listening[0].accept()
        answers.append(reach.accepted(one, listening[1]))

    threading.Thread(target=accept, daemon=True).start()
    return answers


def test_who_knows_the_token_is_let_in_by_the_first_address_that_answers(listening: tuple[socket.socket, str]) -> None:
    accepted = _accepting(listening)
    reach.connect(_head(listening, None, "nonsense", "127.0.0.1:1")).close()
    wait_until(lambda: accepted == [True], 10)


def test_who_does_not_is_not(listening: tuple[socket.socket, str]) -> None:
    """And finds out that the other side belongs to another job, without having told what it knows."""
    accepted = _accepting(listening)
    with pytest.raises(OSError, match=r"cannot be reached \(127\..*: who answers there belongs to another job"):
        reach.connect(_head(listening, "another token"))
    wait_until(lambda: accepted == [False], 10)


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 64])
def test_whatever_else_connects_is_let_go(said: bytes, listening: tuple[socket.socket, str]) -> None:
    accepted = _accepting(listening)
    with socket.create_connection(("127.0.0.1", listening[0].getsockname()[1])) as one:
        one.sendall(said)
        one.shutdown(socket.SHUT_WR)
        wait_until(lambda: accepted == [False], 30)


def test_addresses_begin_with_the_interface_of_the_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(address: str, family: int = socket.AF_INET) -> Any:
        return SimpleNamespace(family=family, address=address)

    found = {
        "lo": [entry("127.0.0.1"), entry("::1", socket.AF_INET6)],
        "eth0": [entry("192.0.2.7"), entry("fe80::1%eth0", socket.AF_INET6), entry("00:11", 17)],
        "ib0": [entry("198.51.100.7"), entry("2001:db8::7", socket.AF_INET6)],
    }
    monkeypatch.setattr("psutil.net_if_addrs", lambda: found)
    assert reach.addresses(5, {}) == ["192.0.2.7:5", "198.51.100.7:5", "[2001:db8::7]:5", "127.0.0.1:5"]
    collectives = {"NCCL_SOCKET_IFNAME": "=ib0,none"}
    assert reach.addresses(5, collectives) == ["198.51.100.7:5", "[2001:db8::7]:5", "192.0.2.7:5", "127.0.0.1:5"]
    assert reach.addresses(5, {"MASTER_ADDR": "198.51.100.7"})[0] == "198.51.100.7:5"
    assert reach.addresses(5, {"MASTER_ADDR": "203.0.113.9"})[0] == "192.0.2.7:5"  # another machine's


@pytest.mark.parametrize(
    ("given", "ports"), [("", []), ("20000-20002", [20000, 20001, 20002]), (" 7000 ", [7000]), ("5-5", [5])]
)
def test_ports_are_those_that_a_firewall_was_told(given: str, ports: list[int]) -> None:
    assert ports_given({"OBSERVER_PORTS": given}) == ports


@pytest.mark.parametrize("given", ["x", "0", "5-4", "1-70000", "20000:20100", "-5", "1,2"])
def test_other_ports_are_one_sentence(given: str) -> None:
    with pytest.raises(ValueError, match=f"^Invalid OBSERVER_PORTS '{given}': write it as 20000-20100$"):
        ports_given({"OBSERVER_PORTS": given})


def test_where_no_port_is_free_that_is_told(
    listening: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OBSERVER_PORTS", str(listening[0].getsockname()[1]))
    with pytest.raises(OSError, match=r"no port of OBSERVER_PORTS is free .*in use"):
        reach.listen()


class Store(dict[str, str]):
    """As torch's."""

    set = dict.__setitem__
    get = dict.__getitem__  # type: ignore[assignment]

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


HEAD = Head(["192.0.2.7:5"], "token")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(meeting_module, "POLL_S", 0.01)
    monkeypatch.setattr(meeting_module, "running_address", lambda: None)
    monkeypatch.setattr(meeting_module, "shared_store", lambda: store)
    return store


def test_rank_0_tells_the_other_machines_where_to_report(store: Store) -> None:
    met: list[Head | None] = []
    other = threading.Thread(target=lambda: met.append(_meet(rank=3, node=1)))
    other.start()
    assert _meet(rank=0) is None
    other.join(30)
    assert met == [HEAD]
    assert _meet(rank=1) is None  # on rank 0's machine
    assert _meet(rank=3, node=1, nodes=1) is None
    assert len(store) == 1


def _meet(rank: int, node: int = 0, nodes: int = 2, deadline: Callable[[], float] = lambda: 1e18) -> Head | None:
    return Meeting(Identity(rank, 4, rank % 2, nodes, node=node), "run").head(lambda: HEAD, deadline)


def test_who_is_told_nothing_says_what_is_missing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "runs on 2 machines, and rank 0 has not told where to report: "
    with pytest.raises(LinkBroken, match=rf"{sentence}it has not called connect\(\) yet"):
        _meet(rank=3, node=1, deadline=lambda: 0.0)
    monkeypatch.setattr(meeting_module, "shared_store", lambda: None)
    with pytest.raises(LinkBroken, match=rf"{sentence}call .*init_process_group\(\), or set RAY_ADDRESS"):
        _meet(rank=3, node=1, deadline=lambda: 0.0)


def test_who_waits_for_long_says_for_what(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(meeting_module, "TOLD_S", 0.0)
    say_again()
    with pytest.raises(LinkBroken):
        _meet(rank=3, node=1, deadline=lambda: 0.0 if "kept meanwhile" in caplog.text else 1e18)
    assert caplog.text.count("What this rank logs is kept meanwhile.") == 1


def test_rank_0_waits_for_no_store_and_tells_when_there_is_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_module, "shared_store", lambda: None)
    meeting = Meeting(Identity(0, 4, 0, 2), "run")
    assert meeting.head(lambda: HEAD, lambda: 1e18) is None
    assert not store
    monkeypatch.setattr(meeting_module, "shared_store", lambda: store)
    wait_until(lambda: len(store) == 1, 10, "it is told")
    meeting.close()


def test_what_was_told_outlives_the_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training may destroy its process group, and no store is kept from it."""
    assert _meet(rank=0) is None
    meeting = Meeting(Identity(3, 4, 1, 2, node=1), "run")
    assert meeting.head(lambda: HEAD, lambda: 0.0) == HEAD
    for gone in (None, SimpleNamespace()):  # the second one breaks
        monkeypatch.setattr(meeting_module, "shared_store", lambda: gone)  # noqa: B023
        assert meeting.head(lambda: HEAD, lambda: 0.0) == HEAD


def test_a_machine_that_cannot_be_reached_reports_all_the_same(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    def reach() -> Head:
        raise LinkBroken("Address already in use")

    say_again()
    assert Meeting(Identity(0, 4, 0, 2), "run").head(reach, lambda: 1e18) is None
    assert "Other machines of this job cannot report: Address already in use." in caplog.text
    told = _meet(rank=3, node=1)
    assert told is not None
    with pytest.raises(OSError, match=r"rank 0's machine cannot be reached \(Address already in use\)"):
        reach_module.connect(told)


def test_a_run_stays_where_it_is_when_rank_0_moves(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an elastic launcher may do. All ranks of the new machine report to the old one, as long as that answers."""
    assert _meet(rank=0) is None
    old = Head(["198.51.100.1:5"], "of the machine before")
    store[next(iter(store))] = msgspec.json.encode(old).decode()
    monkeypatch.setattr(meeting_module, "answers", lambda head: head == old)
    assert [_meet(rank=0), _meet(rank=1), _meet(rank=3, node=1)] == [old] * 3
    monkeypatch.setattr(meeting_module, "answers", lambda head: False)
    assert [_meet(rank=1), _meet(rank=0), _meet(rank=3, node=1)] == [None, None, HEAD]


@pytest.mark.parametrize(
    ("number", "state", "waits"), [(0, "success", True), (0, "crashed", False), (1, "success", False)]
)
def test_rank_0_waits_for_other_machines_where_it_has_succeeded(number: int, state: State, waits: bool) -> None:
    """A launcher may end its machine's processes with it; one that failed must not hold the launcher up."""
    one, other = socket.socketpair()
    streams = Stream(one, 5.0), Stream(other, 5.0)
    said: Any = SimpleNamespace(goodbye=lambda goodbye, wait: Farewell(False, ["a notice"], 3))
    opening: Any = None
    goodbye = Goodbye(rank=number, life="l", state=state, ended_ns=1)
    for needed in (False, True):
        onward = ToWriter(said, opening, streams[0], needed=lambda: needed)  # noqa: B023
        frame = Frame(1, "goodbye", msgspec.Raw(msgspec.msgpack.encode(goodbye.model_dump())))
        onward.hear(frame)
        answer = streams[1].receive(5.0)
        assert answer is not None
        assert decoded(answer.body, Farewell) == Farewell(needed and waits, ["a notice"], 3)
        onward.close()
    for stream in streams:
        stream.close()


def test_a_machine_with_a_cluster_of_its_own_needs_nobody(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was named; or all machines have noted one, and share nothing else."""
    assert _meet(rank=0) is None
    monkeypatch.setattr(meeting_module, "running_address", lambda: "head:6379")
    assert _meet(rank=3, node=1) == HEAD
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert _meet(rank=3, node=1) is None
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(meeting_module, "shared_store", lambda: None)
    assert _meet(rank=3, node=1) is None


def test_what_ranks_of_another_machine_say_arrives_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through their own agent and that of rank 0's machine, whichever is killed."""
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path, api_key="a key"))
    gone: list[int] = []

    class Noting(Link):
        def tell_gone(self, rank: int, life: str) -> None:
            gone.append(rank)

    def to_writer(opening: Opening, stream: Stream, afar: bool) -> ToWriter:
        assert afar
        assert "a key" not in opening.settings.values()  # what goes between machines is not encrypted
        return ToWriter(Noting(cluster), opening, stream)

    heads: list[Head] = []
    streams: list[Stream] = []

    def new_head() -> None:
        heads.append(Server(tmp_path / f"head{len(heads)}", to_writer).reachable())
        heads[-1].addresses.insert(0, f"127.0.0.1:{heads[-1].addresses[0].rpartition(':')[2]}")

    def to_head(opening: Opening, stream: Stream, afar: bool) -> ToHead:
        assert not afar
        assert opening.head is not None
        onward = ToHead(opening.head, opening, stream)
        streams.append(onward._head)
        return onward

    class Met:
        may_start = False

        def head(self, reach: Any, deadline: Any) -> Head:
            return heads[-1]

        def close(self) -> None: ...

    new_head()
    Server(tmp_path / "here", to_head)
    monkeypatch.setattr(starting.Agent, "connect", lambda agent, deadline: starting._connected(tmp_path / "here"))
    monkeypatch.setattr("swanlab_ray.observer.ray_cluster.directories.roots", lambda: [tmp_path / "ours"])
    monkeypatch.setattr("swanlab_ray.observer.ray_cluster.directories.SOCKET_PATH_BYTES", 1000)
    observer = rank(cluster, AgentLink(cluster.settings, "r", Met()), 1, 2)  # type: ignore[arg-type]
    for step in range(40):
        observer.log({"x": step}, step)
        if step % 10 == 5:
            assert observer.flush(30)
            streams[-1].shut()  # as of an agent that was killed
        if step == 20:
            new_head()
    assert observer.finish()
    assert [(number, step) for number, step, _ in logged_in(cluster.files)] == [(1, step) for step in range(40)]
    assert len(streams) >= 4
    assert not gone
