"""Ports of this machine that nobody is given by chance."""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

PORTS = range(20_000, 65_536)
"""Below, Ray has ports of its own."""
LAUNCHERS_PORTS = range(29_400, 29_600)
"""torchrun and Accelerate meet at 29400, 29500 and those that follow."""
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def ports_given(env: Mapping[str, str] = os.environ) -> list[int]:
    """Those that ``OBSERVER_PORTS`` allows, such as ``20000-20100``; none where it is not set.

    Raises:
        ValueError: it is something else.
    """
    given = env.get("OBSERVER_PORTS", "").strip()
    if not given:
        return []
    ends = re.fullmatch(r"(\d+)(?:-(\d+))?", given)
    first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, 0)
    if not 0 < first <= last < 65_536:
        raise ValueError(f"Invalid OBSERVER_PORTS {given!r}: write it as 20000-20100")
    return list(range(first, last + 1))


def free_ports(count: int) -> list[int]:
    """Ports that no connection is given by chance until somebody listens there, best such as are given to none."""
    first, last = 32_768, 60_999
    with suppress(OSError, ValueError):
        first, last = map(int, EPHEMERAL.read_text().split())
    quiet = [port for port in PORTS if port not in LAUNCHERS_PORTS and not first <= port <= last]
    ports: list[int] = []
    chance = random.SystemRandom()  # others have been given the same seed, and the training goes by it
    for port in [*chance.sample(quiet, len(quiet)), *chance.sample(PORTS, len(PORTS))]:
        if len(ports) == count:
            break
        if port in ports:
            continue
        with socket.socket() as one, suppress(OSError):
            one.bind(("", port))
            ports.append(port)
    return ports
