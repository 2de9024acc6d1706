"""How the agents of other machines reach the one of rank 0's: over TCP, where both sides prove that they know a token.

The token is never sent. What is said afterwards is not encrypted, as Ray's own connections are not.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping

import msgspec
import psutil

from swanlab_ray.observer.ray_cluster.addresses import split
from swanlab_ray.observer.ray_cluster.ports import free_ports, ports_given

CONNECT_S = 3.0
"""How long one address is tried."""
PROOF_S = 10.0
"""How long the other side has to prove itself."""
NONCE_BYTES = 32
PROOF_BYTES = 32
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6, "TCP_USER_TIMEOUT": 70_000}
"""A machine that is gone is noticed after about a minute."""


class Head(msgspec.Struct):
    """Where the agent of rank 0's machine listens."""

    addresses: list[str]
    """``HOST:PORT``, best first."""
    token: str
    why: str = ""
    """Why it cannot be reached, where that is known; then it has no addresses."""

    def __repr__(self) -> str:
        return f"Head({self.addresses})"


def listen() -> tuple[socket.socket, str]:
    """Listen on all addresses of this machine; returns the socket, and a new token.

    Raises:
        OSError: no port is free, of those that ``OBSERVER_PORTS`` names if it is set.
    """
    failed: OSError | None = None
    for port in ports_given() or free_ports(8):
        try:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            listening = socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
            return listening, secrets.token_hex(32)
        except OSError as error:
            failed = error
    which = "of OBSERVER_PORTS " if ports_given() else ""
    raise OSError(f"no port {which}is free ({failed})")


def addresses(port: int, env: Mapping[str, str] = os.environ) -> list[str]:
    """Those of this machine, best first: of the interface that the job's collectives are told to use, then what the
    launcher calls this machine, then all others that another machine may know."""
    families = (socket.AF_INET, socket.AF_INET6)
    interfaces = {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }
    best = []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        for name in env.get(variable, "").split(","):
            best += interfaces.get(name.strip().lstrip("="), [])
    master = env.get("MASTER_ADDR", "")
    known = {address for found in interfaces.values() for address in found}
    if master and known.intersection(_resolved(master)):
        best.append(master)
    found = [*best, *sorted(known, key=lambda address: (":" in address, address))]
    usable = [address for address in dict.fromkeys(found) if not address.startswith(("127.", "fe80:", "::1"))]
    usable.append("127.0.0.1")  # where machines are made of one, without a network
    return [f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in usable]


def _resolved(host: str) -> set[str]:
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def connect(head: Head) -> socket.socket:
    """Connect to it.

    Raises:
        OSError: it cannot be reached, under any of its addresses.
    """
    failed = [head.why] if head.why else []
    for address in head.addresses:
        try:
            one = socket.create_connection(split(address), CONNECT_S)
        except (OSError, ValueError) as error:
            failed.append(f"{address}: {error}")
            continue
        try:
            _keep_alive(one)
            prove(one, head.token, first=False)
        except OSError as error:
            one.close()
            failed.append(f"{address}: {error}")
        else:
            return one
    if len(failed) > 1 and failed[-1].startswith("127.0.0.1:"):
        failed.pop()  # it is there for machines without a network
    remedy = "" if head.why else ": let that port through, or name others for it in OBSERVER_PORTS"
    raise OSError(f"The agent of rank 0's machine cannot be reached ({'; '.join(failed)}){remedy}")


def answers(head: Head) -> bool:
    """Whether it can be reached."""
    try:
        connect(head).close()
    except OSError:
        return False
    return True


def accepted(one: socket.socket, token: str) -> bool:
    """Whether who has connected knows the token."""
    try:
        _keep_alive(one)
        prove(one, token, first=True)
    except OSError:
        one.close()
        return False
    return True


def prove(one: socket.socket, token: str, first: bool) -> None:
    """Each side proves to the other that it knows the token.

    Args:
        first: whether this side speaks first; the other does not.

    Raises:
        OSError: the other side does not know it, or says nothing.
    """
    deadline = time.monotonic() + PROOF_S
    one.settimeout(PROOF_S)
    ours = secrets.token_bytes(NONCE_BYTES)
    one.sendall(ours)
    theirs = b"".join(_received(one, NONCE_BYTES, deadline))
    one.sendall(_proof(token, first, theirs))
    if not hmac.compare_digest(b"".join(_received(one, PROOF_BYTES, deadline)), _proof(token, not first, ours)):
        raise ConnectionError("who answers there belongs to another job")


def _proof(token: str, first: bool, nonce: bytes) -> bytes:
    return hmac.digest(token.encode(), (b"1" if first else b"2") + nonce, "sha256")


def _received(one: socket.socket, size: int, deadline: float) -> Iterator[bytes]:
    while size:
        one.settimeout(max(0.01, deadline - time.monotonic()))
        more = one.recv(size)
        if not more:
            raise ConnectionError("who answers there belongs to another job")
        size -= len(more)
        yield more


def _keep_alive(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in KEEPALIVE.items():
        one.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
