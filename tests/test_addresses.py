"""Addresses that are meant for something else, or where something else answers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from swanlab_ray.observer.ray_cluster import addresses
from swanlab_ray.observer.ray_cluster import finding as cluster

Answer = Callable[[socket.socket], None]


@pytest.fixture
def listener() -> Iterator[Callable[..., str]]:
    """Starts something that answers each connection; returns where it listens."""
    listening: list[socket.socket] = []

    def start(answer: Answer, host: str = "127.0.0.1") -> str:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = socket.create_server((host, 0), family=family)
        listening.append(server)

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection, suppress(OSError):  # it was only looked whether somebody listens
                    answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        port = server.getsockname()[1]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    yield start
    for server in listening:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def _http(connection: socket.socket) -> None:
    connection.recv(100)
    connection.sendall(b"HTTP/1.0 505 HTTP Version not supported\r\n\r\n")


def _redis(connection: socket.socket) -> None:
    connection.recv(100)
    connection.sendall(b"-ERR unknown command 'PRI'\r\n")


def _grpc(connection: socket.socket) -> None:
    for byte in b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x7f\xff\xff\xff":  # as it comes in the worst case
        connection.sendall(bytes([byte]))
    connection.recv(100)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize(("answer", "spoken"), [(_http, "something else"), (_redis, "something else"), (_grpc, "gRPC")])
def test_what_is_no_ray_is_recognised(answer: Answer, spoken: str, host: str, listener: Callable[..., str]) -> None:
    address = listener(answer, host)
    assert addresses.answers(address)
    assert addresses.speech(address) == spoken


def test_who_says_nothing_may_be_busy(listener: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no reason to start another cluster, since other ranks may find it answers."""
    monkeypatch.setattr(addresses, "CONNECT_DEADLINE_S", 0.2)
    address = listener(lambda connection: connection.recv(100) and threading.Event().wait(1))
    assert addresses.speech(address) == "nothing"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(cluster.NoCluster, match="is listened to, but nothing is answered there"):
        cluster.meant()


@pytest.mark.parametrize("address", ["", "nonsense", "host:port", ":6379", "host:0", "host:70000", "[::1]", "a b:1"])
def test_nobody_answers_at_what_is_no_address(address: str) -> None:
    assert not addresses.answers(address)
    assert addresses.speech(address) == "nothing"


@pytest.mark.parametrize("address", ["local", "http://127.0.0.1:8265", "https://head:8265", None])
def test_an_address_for_another_purpose_costs_one_sentence(
    address: str | None,
    listener: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The run has a cluster of its own."""
    given = address or listener(_http)
    monkeypatch.setenv("RAY_ADDRESS", given)
    for _ in range(2):
        assert cluster.meant() is None
    (said,) = [record.getMessage() for record in caplog.records if given in record.getMessage()]
    assert said.count("\n") == 0


def test_a_noted_cluster_that_is_none_is_not_joined(
    listener: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`ray start` notes where temporary files lie, which `TMPDIR` says as well."""
    address = listener(_redis)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(address)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert cluster.running_address() == address
    assert cluster.meant() is None
    assert f"'{address}', noted on this machine as its Ray cluster, is none" in caplog.text


def test_another_version_is_named_with_ours() -> None:
    """Ray tells them in lines of their own."""
    error = RuntimeError(
        "Version mismatch: The cluster was started with:\n    Ray: 2.50.0\n    Python: 3.10.1\n"
        "This process on node 10.0.0.1 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
    )
    told = cluster._brief(error)
    assert "\n" not in told
    assert all(version in told for version in ("2.50.0", "3.10.1", "2.60.0", "3.11.7"))
