"""Addresses of Ray clusters: what is meant, whether anybody answers there, and whether that is Ray."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

Speech = Literal["gRPC", "something else", "nothing"]

CONNECT_DEADLINE_S = 5.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

_SETTINGS = b"\0\0\0\x04\0\0\0\0\0"  # an empty frame of that type


class NoCluster(ConnectionError):
    """There is no Ray to report to. The message says why and what to do."""


def split(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPv6]:PORT``.

    Raises:
        ValueError: it is something else.
    """
    host, _, port = address.rpartition(":")
    if not host or not 0 < int(port) < 65_536:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def names_no_cluster(address: str) -> str | None:
    """Why a ``RAY_ADDRESS`` is not meant for ranks; None where it may be."""
    if address == "local":
        return "it asks for one of the script's own"
    if address.startswith(("http://", "https://")):
        return "it is the address of a dashboard"
    return None


def answers(address: str) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection(split(address), CONNECT_DEADLINE_S).close()
    except (OSError, ValueError, UnicodeError):
        return False
    return True


def speech(address: str) -> Speech:
    """What is spoken there. Ray's GCS speaks gRPC; nothing is said by what is busy, or has ended."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return "gRPC"  # Ray finds out
    said = b""
    with (
        suppress(OSError, ValueError, UnicodeError),
        socket.create_connection(split(address), CONNECT_DEADLINE_S) as one,
    ):
        one.sendall(_PREFACE + _SETTINGS)
        deadline = time.monotonic() + CONNECT_DEADLINE_S
        while len(said) < 5 and (left := deadline - time.monotonic()) > 0:
            one.settimeout(left)
            more = one.recv(64)
            if not more:
                break
            said += more
    if not said:
        return "nothing"
    # A frame of an HTTP/2 server begins with its length; its first one is of the type SETTINGS.
    return "gRPC" if len(said) >= 5 and said[0] == 0 and said[3] == 4 else "something else"


def noted_on_this_machine(anybody: bool) -> str | None:
    """The address that ``ray start`` has noted; one that another user has noted only if ``anybody`` is right."""
    places = [os.environ.get("RAY_TMPDIR"), os.environ.get("TMPDIR"), "/tmp"]
    given = places[0]
    for place in [given] if given else places[1:]:
        if not place:
            continue
        noted = Path(place, "ray", "ray_current_cluster")
        with suppress(OSError, UnicodeDecodeError):
            # A cluster that somebody else has noted would get this user's data and API key.
            if anybody or noted.stat().st_uid == os.getuid():
                address = noted.read_text().strip()
                if answers(address):
                    return address
    return None


def socket_answers(path: str) -> bool:
    """Whether a process listens on a unix socket."""
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.settimeout(CONNECT_DEADLINE_S)
            one.connect(path)
    except OSError:
        return False
    return True
