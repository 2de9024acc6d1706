"""The agent: the one process of a machine that speaks to Ray for its ranks.

Started by a rank as ``python -m swanlab_ray.observer.agent.process [--no-dashboard] DIRECTORY``. It is a process of its
own so that it outlives the rank that happened to start it, even one that is killed. It finds or starts Ray when a rank
asks for that, and ends when no rank and no writer of its cluster lives any more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path

from swanlab_ray.actors.log import log
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.locks import hold_lock, nobody_holds
from swanlab_ray.actors.wire.secret_shapes import masked
from swanlab_ray.observer.agent.frames import Opening, Stream
from swanlab_ray.observer.agent.onward import ToHead, ToWriter, Unstarted
from swanlab_ray.observer.agent.private import Cluster
from swanlab_ray.observer.agent.serving import Onward, Server
from swanlab_ray.observer.ray_cluster import directories, finding
from swanlab_ray.observer.ray_cluster.addresses import NoCluster
from swanlab_ray.observer.ray_cluster.link import Connection, RayLink

GRACE_S = 4.0
"""The lock may be free this long: a restarted writer needs about two seconds."""
POLL_S = 0.5
TOUCH_S = 600.0
LEAVE_S = 60
OPENED_S = 30.0
"""How long ranks of other machines wait for one of this machine to be welcomed first."""
AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


class Agent:
    """Ray is used from the main thread where that matters; the ranks' threads wait for it.

    Args:
        directory: of this agent.
        lock: descriptor of ``directory/agent``.
        dashboard: whether a cluster that it starts has one.
    """

    def __init__(self, directory: Path, lock: int, dashboard: bool) -> None:
        self._directory = directory
        self._lock = lock
        self._dashboard = dashboard
        self._links: dict[str, RayLink] = {}  # by the life of a rank, which may come back over another socket
        self._opened = threading.Event()
        self._cluster: Cluster | None = None
        self._asking = threading.Lock()
        self._connection: Future[Connection] = Future()
        self._wanted = threading.Event()
        self._may_start = False
        self._run_id = (directory / directories.MARK).read_text()

    def connect(self, may_start: bool) -> Connection:
        """The connection to Ray; called on the ranks' threads.

        Args:
            may_start: whether a cluster may be started where none is meant.

        Raises:
            NoCluster: it could not be joined, or started here; the next call tries it again.
            Unstarted: it could not be started, and this process ends.
        """
        with self._asking:
            connection = self._connection
            self._may_start = self._may_start or may_start
            self._wanted.set()
        return connection.result()

    def run(self) -> None:
        """Until nobody needs it any more."""
        directories.sweep(self._directory.parent)
        self._server = Server(self._directory / "socket", self._onward)
        while True:
            self._wait_until_unused()
            # Nobody finds it any more under its name; then nobody can have come in between.
            ended = directories.put_away(self._directory, ["alive"])
            if ended is not None or not self._is_ours() or nobody_holds(str(self._directory / "alive")):
                break
        if "ray" in sys.modules:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LEAVE_S)  # Ray waits for a cluster that is gone
            finding.leave()
        if ended is not None:
            shutil.rmtree(ended, ignore_errors=True)
        if self._cluster is not None:
            self._cluster.remove()

    def _onward(self, opening: Opening, stream: Stream, afar: bool) -> Onward:
        if afar:
            if opening.run_id != self._run_id:
                raise ValueError(f"the agent of rank 0's machine is that of another run, {self._run_id}")
            self._after_this_machine()
        elif opening.head is not None and not self._server.is_head(opening.head):
            return ToHead(opening.head, opening, stream)
        life = opening.hello.life
        if life not in self._links:
            # A newer rank may have settings that this version does not know.
            known = {name: value for name, value in opening.settings.items() if name in ObserverSettings.model_fields}
            connect = partial(self.connect, opening.may_start)
            self._links[life] = RayLink(ObserverSettings(**known), opening.run_id, connect)
        return ToWriter(self._links[life], opening, stream, self._opened.set, self._server.needed)

    def _after_this_machine(self) -> None:
        """The run goes by the settings of rank 0's machine, where it lies: its ranks come first."""
        with suppress(NoCluster, Unstarted):
            self.connect(may_start=True)
            self._opened.wait(OPENED_S)

    def _wait_until_unused(self) -> None:
        unused_since: float | None = None
        touched = 0.0
        while True:
            if self._wanted.wait(POLL_S):
                self._wanted.clear()
                self._answer()
            if self._cluster is not None:
                self._cluster.check()
            now = time.monotonic()
            if self._server.needed() or not nobody_holds(str(self._directory / "alive")):
                unused_since = None
                if now - touched >= TOUCH_S:
                    touched = now
                    self._keep_young()
                continue
            unused_since = unused_since or now
            if now - unused_since >= GRACE_S or (self._directory / "over").exists():
                return

    def _answer(self) -> None:
        connection = self._connection
        if connection.done():
            return
        try:
            connection.set_result(self._join_or_start())
        except Exception as error:
            with self._asking:
                self._connection = Future()
                self._wanted.clear()
            log(masked(f"{type(error).__name__}: {error}"))
            connection.set_exception(error if isinstance(error, NoCluster) else NoCluster(str(error)))

    def _join_or_start(self) -> Connection:
        address = finding.meant()
        if address is not None and self._joined(address):
            self._publish(address, None)
            return Connection(address)
        if not self._may_start:
            raise NoCluster("There is no Ray cluster on this machine, and that of rank 0's machine is not known.")
        self._cluster = Cluster(self._directory, self._give_up)
        context = self._cluster.start(self._dashboard)
        address = str(context.address_info["gcs_address"])
        self._publish(address, context.dashboard_url or None)
        return Connection(address, str(self._directory / "alive"))

    def _joined(self, address: str) -> bool:
        """False where it is of another version, and only happens to run on this machine."""
        try:
            finding.join(address, f"swanlab-ray agent on {os.uname().nodename}")
        except finding.OtherVersion as error:
            if os.environ.get("RAY_ADDRESS"):
                raise
            finding.leave()
            log(masked(str(error)))
            return False
        return True

    def _publish(self, address: str, dashboard: str | None) -> None:
        described = {
            "address": address,
            "dashboard": dashboard,
            "environment": {name: os.environ[name] for name in AUTHENTICATION if name in os.environ},
        }
        unfinished = self._directory / "cluster.new"
        with suppress(OSError):  # only those who look from outside need it
            unfinished.touch(mode=0o600)
            unfinished.write_text(json.dumps(described))
            unfinished.rename(self._directory / "cluster")

    def _give_up(self, why: str) -> None:
        """The cluster could not be started, or has ended, and this process ends. The ranks that wait are told."""
        log(masked(why))
        if not self._connection.done():
            self._connection.set_exception(Unstarted(why))

    def _keep_young(self) -> None:
        places = [self._directory] if self._cluster is None else [self._directory, self._cluster.session]
        for place in places:
            with suppress(OSError):  # a file goes while they are listed
                directories.keep_young([place, *place.rglob("*")])

    def _is_ours(self) -> bool:
        """Whether the directory is the one this agent was started for; another can have been made in its place."""
        try:
            return os.path.samestat(os.fstat(self._lock), (self._directory / "agent").stat())
        except OSError:
            return False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-dashboard", dest="dashboard", action="store_false")
    parser.add_argument("directory", type=Path)
    given = parser.parse_args()
    directory = given.directory
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C is for the training; the agent ends after it
    if not directories.made_here(directory):
        sys.exit(f"{directory} is none of our directories.")
    try:
        os.getcwd()
    except FileNotFoundError:  # somebody has removed that of the training, and Ray asks for it
        os.chdir(directory.parent)
    lock = hold_lock(str(directory / "agent"))
    Agent(directory, lock, given.dashboard).run()


if __name__ == "__main__":
    main()
