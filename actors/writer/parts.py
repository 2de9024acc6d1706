"""What a writer is made of, and the way through it: each station knows the next one.

The journal's thread passes what is on disk to the members, whose ranks may forget it, and to the decoding thread; that
shows it to the view and passes it to the reducer's thread, and that to the thread of SwanLab's run.
"""

from __future__ import annotations

import os
import socket

from swanlab_ray.actors.delivery.follow import Reducer
from swanlab_ray.actors.delivery.kinds import make_sink
from swanlab_ray.actors.delivery.notes import DeliveryNotes
from swanlab_ray.actors.delivery.sink import Sink
from swanlab_ray.actors.health.hangs import Health
from swanlab_ray.actors.journal.decoding import Decoding
from swanlab_ray.actors.journal.files import run_directory
from swanlab_ray.actors.journal.records import REDUCTION_VERSION, Header
from swanlab_ray.actors.journal.writing import Committed, Journal
from swanlab_ray.actors.membership.clocks import RunClock
from swanlab_ray.actors.membership.membership import Membership
from swanlab_ray.actors.membership.on_disk import OnDisk
from swanlab_ray.actors.notify.notices import Notices
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.version import package_version
from swanlab_ray.actors.writer.recovery import recover
from swanlab_ray.actors.writer.run_view import RunView


class Parts:
    """Those of one run's writer.

    Args:
        run_id: identity of the run.
        settings: as the first rank passed them.
    """

    def __init__(self, run_id: str, settings: ObserverSettings) -> None:
        self.run_id = run_id
        self.settings = settings
        self.directory = run_directory(settings.log_dir, run_id)
        self.journal = Journal(self.directory, self._header, self._on_trouble, self._on_fenced)
        self.notices = Notices(self.journal)
        on_disk = OnDisk(self.journal)
        self.recovered = found = recover(self.journal, on_disk, settings, self.notices)
        self.clock = RunClock(found.last_ns)
        self.members = Membership(
            run_id, settings, self.journal, on_disk, self.clock, self.notices, found.sessions, found.restarts
        )
        self.health = Health(settings.hang_timeout, self.members.processes.state)
        self.view = RunView(self.members, self.health)
        self.notes = DeliveryNotes(self.journal, found.rows, list(found.run_dirs))
        self.reducer = Reducer(
            self.directory, found.begun, found.committed, self._make_sink, settings, self.notices, found.before_ns
        )
        self.decoding = Decoding(self.view.look, self.reducer.put)

    def start(self) -> None:
        """Begin to write the journal, and to carry into SwanLab what it has of a run that goes on."""
        if self.members.ranks or self.recovered.finished is not None:
            self.reducer.open(self.recovered.finished)
        self.journal.start(self._on_commit)

    def _on_commit(self, committed: list[Committed]) -> None:
        self.decoding.put(committed)  # first: whoever is told that it is on disk may ask what was found in it
        self.members.committed(committed)

    def _make_sink(self) -> Sink:
        return make_sink(self.run_id, self.settings, self.directory, self.notes, self.notices)

    def _header(self, epoch: int) -> Header:
        return Header(
            kind="journal",
            run_id=self.run_id,
            epoch=epoch,
            host=socket.gethostname(),
            pid=os.getpid(),
            settings=self.settings.public(),
            package=package_version(),
            reduction_version=REDUCTION_VERSION,
        )

    def _on_trouble(self, error: OSError | None) -> None:
        if error is None:
            self.notices("The journal is written again.")
            return
        self.notices(
            f"The journal cannot be written in {self.directory} ({error.strerror or error}). The training goes on; "
            "ranks keep what they log, in memory and then on their own disks, until it can."
        )

    def _on_fenced(self) -> None:
        self.notices(
            f"Another writer has taken over run {self.run_id}; this one (pid {os.getpid()}) has stopped. If these are "
            "two jobs, give each its own OBSERVER_RUN_ID."
        )
        self.reducer.abandon(close=False)
