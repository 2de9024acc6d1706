"""Through which proxy an address is reached, by the usual variables.

httpx reads them itself, but cannot be made at all where one entry of ``NO_PROXY`` is a range of IPv6 addresses. Here an
entry that makes no sense is passed over.
"""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

PORTS = {"http": 80, "https": 443}


def proxy_for(url: str) -> str | None:
    """The proxy's address, from ``HTTP_PROXY`` or ``HTTPS_PROXY`` by the address' scheme, else from ``ALL_PROXY``; None
    where there is none, or ``NO_PROXY`` names the host.
    """
    address, variables = urlsplit(url), getproxies_environment()
    proxy = (variables.get(address.scheme) or variables.get("all") or "").strip()
    left_out = re.split(r"[\s,]+", variables.get("no", "").lower())
    host, port = (address.hostname or "").rstrip("."), address.port or PORTS.get(address.scheme)
    if not proxy or any(_names(entry, host, port) for entry in left_out if entry):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _names(entry: str, host: str, port: int | None) -> bool:
    """Whether an entry of ``NO_PROXY`` means this host: ``*``, a domain, an address, a range, perhaps with a port."""
    if entry == "*":
        return True
    entry = entry.rpartition("://")[2]
    try:
        return ip_address(host) in ip_network(entry.replace("[", "").replace("]", ""), strict=False)
    except ValueError:  # one of them is a name, or has a port
        pass
    name, colon, number = entry.rpartition(":")
    if colon and number.isdigit():
        return int(number) == port and _names(name, host, None)
    name = entry.lstrip("*").strip(".").strip("[]")
    return bool(name) and (host == name or host.endswith(f".{name}"))
