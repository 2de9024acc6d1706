"""Taking over a run that has a journal: what an earlier incarnation of the writer, or an earlier job, has left."""

from __future__ import annotations

import time
from collections.abc import Set
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
from swanlab_ray.actors.wire.text import many


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What there is of a run when its writer begins; nothing, by default."""

    begun: Position
    """Where its entries begin, as far as they can be read."""
    committed: Position
    """Where they end."""
    sessions: Sessions = field(default_factory=Sessions)
    """Its jobs."""
    jobs: int = 0
    """How many it has had."""
    began_ns: int = 0
    """When the last of them began; 0: nobody had said hello."""
    before_ns: int = 0
    """When the one before the present one had ended."""
    last_ns: int = 0
    """The latest moment that its journal knows."""
    finished: Finished | None = None
    """The end of the present one, where that is in the journal and not all of it was closed."""
    notified: Set[str] = frozenset()
    """Keys of the notifications that the present one has sent."""
    alerts: Set[str] = frozenset()
    """Sentences that were told."""
    run_dirs: tuple[str, ...] = ()
    """Directories of the SwanLab runs that were begun."""
    rows: int = 0
    """Rows that SwanLab's cloud has confirmed."""

    @property
    def restarts(self) -> int:
        """Times that the present job was started again."""
        return sum(text.startswith(RESTARTED) for text in self.alerts) if self.sessions.over is None else 0


def recover(journal: Journal, on_disk: OnDisk, settings: ObserverSettings, notices: Notices) -> Recovered:
    """Read what the journal has of earlier incarnations."""
    here = Position(journal.epoch or max(journal.earlier, default=0) + 1, 0)
    nothing = Recovered(begun=here, committed=here)
    began = time.monotonic()
    try:
        summary = on_disk.read()
    except (OSError, UnknownFormat) as error:
        notices(f"The journal of this run cannot be read ({error}); what it has is not in SwanLab's run.")
        return nothing
    if not journal.earlier or summary is None:
        return nothing
    on_disk.join(summary)
    damaged = any(not found.damage.torn for found in summary.damaged)
    if damaged:
        notices(f"The journal of this run is damaged; see: swanlab-ray verify {journal.directory}")
    log(
        f"the journal has {many(summary.events, 'event')} of {many(len(summary.ranks()), 'rank')} "
        f"(read in {time.monotonic() - began:.1f} s): {journal.directory}"
    )
    sessions = Sessions(summary)
    over = sessions.over
    return Recovered(
        begun=Position(0, 0),
        committed=here,
        sessions=sessions,
        jobs=summary.sessions,
        began_ns=summary.session_ns,
        before_ns=over.time_ns if over is not None else summary.before_ns,
        last_ns=summary.last_ns,
        finished=summary.finished if over is None else None,
        notified=summary.notified,
        alerts={alert.text for alert in summary.alerts},
        run_dirs=tuple(opened.run_dir for opened in summary.opened if opened.run_dir),
        rows=_delivered(summary, settings) if not damaged else 0,
    )


def _delivered(summary: Summary, settings: ObserverSettings) -> int:
    """Rows that SwanLab's cloud has confirmed, as this version and these settings count them."""
    return summary.rows.get(REDUCTION_VERSION, 0) if same_place(summary, settings) else 0
