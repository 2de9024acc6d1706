"""Machines for tests: network namespaces with an address, a name, process ids and private places of their own."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from swanlab_ray.observer.ray_cluster import directories
from tests.conftest import wait_until

# Each host has its own root for agents, as each machine has its own /tmp; nobody is asked for names. Process 1 reaps.
HOST = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/resolv.conf" /etc/resolv.conf
mkdir -p -m 700 "$3"
mount -t tmpfs -o mode=700 tmpfs "$3"
touch "$2/$1"
sleep infinity & wait
"""


def why_impossible() -> str | None:
    """Why there can be no hosts here, if so."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "ip (Debian: iproute2) is not installed"
    tried = subprocess.run(["ip", "netns", "add", f"try{os.getpid()}"], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", f"try{os.getpid()}"], capture_output=True, check=False)
    return tried.stderr.strip() or None


_made = itertools.count()


class Hosts:
    """So many of them, on one bridge; with IPv4, or IPv6 only."""

    def __init__(self, count: int, ipv6: bool = False) -> None:
        reason = why_impossible()
        if reason is not None:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no hosts here: {reason}")
        # What a host's end leaves to the kernel may still be there when the next one of its number begins.
        self._mark = f"{os.getpid() % 10_000}{next(_made) % 100:02}"
        self._net = "fd00::" if ipv6 else f"10.{os.getpid() % 200 + 20}.{os.getpid() // 200 % 250}."
        self._mask = "64 nodad" if ipv6 else "24"
        self._files = Path(tempfile.mkdtemp(prefix="hosts-"))
        self._holders: list[subprocess.Popen[bytes]] = []
        self._started: list[subprocess.Popen[bytes]] = []
        self.count = count
        names = [f"{self.address(number)} h{number}" for number in range(count)]
        (self._files / "hosts").write_text("\n".join(["127.0.0.1 localhost", "::1 localhost", *names]) + "\n")
        (self._files / "resolv.conf").touch()
        bridge = f"br{self._mark}"
        _ip(f"link add {bridge} type bridge")
        _ip(f"link set {bridge} up")
        self._first: list[int] = []
        try:
            for number in range(count):
                self._boot(number, bridge)
        except BaseException:
            self.end()
            raise

    def _boot(self, number: int, bridge: str) -> None:
        name, link, host = self._name(number), self._link(number), f"h{number}"
        _ip(f"netns add {name}")
        _ip(f"link add {link} type veth peer name eth0 netns {name}")
        _ip(f"link set {link} master {bridge} up")
        _ip(f"-n {name} addr add {self.address(number)}/{self._mask} dev eth0")
        _ip(f"-n {name} link set eth0 up")
        _ip(f"-n {name} link set lo up")
        unshare = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["bash", "-c", HOST, "host", host, str(self._files), str(directories.roots()[0])]
        holder = subprocess.Popen(["ip", "netns", "exec", name, *unshare, "--propagation", "private", *command])
        self._holders.append(holder)
        wait_until(lambda: (self._files / host).exists(), 30, "a host is up")
        (first,) = psutil.Process(holder.pid).children()
        self._first.append(first.pid)

    def address(self, number: int) -> str:
        return f"{self._net}{number + 1}"

    def _name(self, number: int) -> str:
        return f"h{self._mark}-{number}"

    def _link(self, number: int) -> str:
        return f"v{self._mark}-{number}"

    def start(self, number: int, command: list[str], directory: Path, output: Path, env: Mapping[str, str]) -> None:
        """Run a command there."""
        enter = ["nsenter", f"--target={self._first[number]}", "--mount", "--uts", "--pid", "--net"]
        with open(output, "ab") as file:
            started = subprocess.Popen(
                [*enter, f"--wdns={directory}", *command],
                env=dict(env),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(started)

    def processes(self, number: int) -> list[int]:
        """Those of a host, without what makes it one."""
        first = psutil.Process(self._first[number])
        own = {
            self._holders[number].pid,
            first.pid,
            *(child.pid for child in first.children() if child.name() == "sleep"),
        }
        told = subprocess.run(["ip", "netns", "pids", self._name(number)], capture_output=True, text=True, check=True)
        return [int(pid) for pid in told.stdout.split() if int(pid) not in own]

    def kill(self, number: int) -> None:
        """All its processes, at once."""
        while pids := self.processes(number):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def cut(self, number: int) -> None:
        """Its network is gone."""
        _ip(f"link set {self._link(number)} down")

    def mend(self, number: int) -> None:
        _ip(f"link set {self._link(number)} up")

    def forbid(self, number: int, port: int) -> None:
        """It may reach this TCP port of nobody, as behind a firewall."""
        family = "-6" if ":" in self._net else "-4"
        _ip(f"{family} -n {self._name(number)} rule add ipproto tcp dport {port} prohibit")

    def end(self) -> None:
        for holder in self._holders:
            holder.kill()
        for process in [*self._holders, *self._started]:
            process.wait(60)
        for number in range(self.count):
            with suppress(subprocess.CalledProcessError):  # it was never there
                _ip(f"netns del {self._name(number)}")
        _ip(f"link del br{self._mark}")
        shutil.rmtree(self._files, ignore_errors=True)


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)
