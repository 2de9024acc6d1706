"""Taking over a run that has a journal: what an earlier incarnation of the writer, or an earlier job, has left."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from swanlab_ray.actors.journal.records import REDUCTION_VERSION, Finished, UnknownFormat
from swanlab_ray.actors.journal.writing import Journal, Position
from swanlab_ray.actors.log import log
from swanlab_ray.actors.membership.on_disk import OnDisk
from swanlab_ray.actors.membership.sessions import Sessions, same_place
from swanlab_ray.actors.notify.messages import RESTARTED
from swanlab_ray.actors.notify.notices import Notices
from swanlab_ray.actors.runs.summary import Summary
from swanlab_ray.actors.settings import ObserverSettings


@dataclass(frozen=True, slots=True)
class Recovered:
    """What there is of a run when its writer begins; nothing, by default."""

    begun: Position
    """Where its entries begin, as far as they can be read."""
    committed: Position
    """Where they end."""
    summary: Summary | None = None
    damaged: bool = False
    sessions: Sessions = field(default_factory=Sessions)

    @property
    def finished(self) -> Finished | None:
        """The end of its last job, where that is in the journal and not all of it was closed."""
        return self.summary.finished if self.summary is not None and self.sessions.over is None else None

    @property
    def last_ns(self) -> int:
        """The latest moment that its journal knows."""
        return self.summary.last_ns if self.summary is not None else 0

    @property
    def before_ns(self) -> int:
        """When its job before the present one had ended."""
        if self.sessions.over is not None:
            return self.sessions.over.time_ns
        return self.summary.before_ns if self.summary is not None else 0

    @property
    def restarts(self) -> int:
        """Times that the present job was started again."""
        if self.summary is None or self.sessions.over is not None:
            return 0
        return sum(alert.text.startswith(RESTARTED) for alert in self.summary.alerts)

    @property
    def run_dirs(self) -> list[str]:
        """Directories of the SwanLab runs that were begun."""
        return [opened.run_dir for opened in self.summary.opened if opened.run_dir] if self.summary is not None else []

    def rows(self, settings: ObserverSettings) -> int:
        """Rows that SwanLab's cloud has confirmed, as these settings count them."""
        if self.summary is None or self.damaged or not same_place(self.summary, settings):
            return 0
        return self.summary.rows.get(REDUCTION_VERSION, 0)


def recover(journal: Journal, on_disk: OnDisk, notices: Notices) -> Recovered:
    """Read what the journal has of earlier incarnations."""
    epoch = journal.epoch or max(journal.earlier, default=0) + 1
    here = Position(epoch, 0)
    began = time.monotonic()
    try:
        summary = on_disk.read()
    except (OSError, UnknownFormat) as error:
        notices(f"The journal of this run cannot be read ({error}); what it has is not in SwanLab's run.")
        return Recovered(here, here)
    if not journal.earlier or summary is None:
        return Recovered(here, here)
    on_disk.join(summary)
    damaged = any(not found.damage.torn for found in summary.damaged)
    if damaged:
        notices(f"The journal of this run is damaged; see: swanlab-ray verify {journal.directory}")
    log(
        f"the journal has {summary.events} events of {len(summary.ranks())} ranks "
        f"(read in {time.monotonic() - began:.1f} s): {journal.directory}"
    )
    return Recovered(Position(0, 0), here, summary, damaged, Sessions(summary))
