"""Ports of this machine that nobody is given by chance."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path

PORTS = range(20_000, 65_536)
"""Below, Ray has ports of its own."""
LAUNCHERS_PORTS = range(29_400, 29_600)
"""torchrun and Accelerate meet at 29400, 29500 and those that follow."""
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """Ports that no connection is given by chance until somebody listens there, best such as are given to none."""
    first, last = 32_768, 60_999
    with suppress(OSError, ValueError):
        first, last = map(int, EPHEMERAL.read_text().split())
    quiet = [port for port in PORTS if port not in LAUNCHERS_PORTS and not first <= port <= last]
    ports: list[int] = []
    for port in [*random.sample(quiet, len(quiet)), *random.sample(PORTS, len(PORTS))]:
        if len(ports) == count:
            break
        if port in ports:
            continue
        with socket.socket() as one, suppress(OSError):
            one.bind(("", port))
            ports.append(port)
    return ports
