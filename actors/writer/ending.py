"""How and when the run ends, and the way out: SwanLab's run and the journal are closed."""

from __future__ import annotations

import time

from swanlab_ray.actors.delivery.sink import FINISH_DEADLINE_S
from swanlab_ray.actors.journal.records import Closed, Finished
from swanlab_ray.actors.membership import lost
from swanlab_ray.actors.membership.members import never_reported, verdict
from swanlab_ray.actors.notify.messages import ONLY_RANK_0
from swanlab_ray.actors.wire.events import State
from swanlab_ray.actors.writer.parts import Parts

CLOSE_DEADLINE_S = FINISH_DEADLINE_S + 10.0
"""How long the actor stays at the most to work off what was acknowledged and to close the run."""
JOURNAL_DEADLINE_S = 10.0
"""How long the end waits for a disk that takes nothing."""


class Ending:
    """Judges the run, and closes it.

    Args:
        parts: of the writer. The members' lock guards :meth:`look`.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._members = parts.members
        finished = parts.recovered.finished
        self.outcome: tuple[State, str | None] | None = (finished.state, finished.error) if finished else None
        """How it ended, with the error; None while it goes on."""

    def as_it_was(self) -> None:
        """Nobody has come to go on with a run that had ended."""
        over = self._members.sessions.over
        assert over is not None
        self.outcome = over.state, over.error

    def look(self, now: float) -> None:
        """See whether the run is over; ``now`` is monotonic."""
        if self.outcome is not None or not self._all_have_ended(now):
            return
        ranks, world_size = self._members.ranks, self._members.world_size
        if self._members.sessions.over is not None and not ranks:
            self.as_it_was()
            return
        state, error = verdict(ranks, world_size)
        may_restart = state == "crashed" and self._members.restarts.may_follow(ranks)
        if may_restart and now - self._members.heard < self._parts.settings.restart_timeout:
            return  # the launcher may start it again
        if state == "success" and never_reported(ranks, world_size):
            self._parts.notices(f"{ONLY_RANK_0} of {world_size} ranks: the end of this run is its word alone.")
        self.outcome = state, error
        finished = Finished(time_ns=self._parts.clock.now_ns(), state=state, error=error)
        self._parts.reducer.finish(finished)
        self._parts.journal.append(finished)

    def _all_have_ended(self, now: float) -> bool:
        """Those that are there, and no other is waited for any more."""
        ranks, restarts = self._members.ranks, self._members.restarts
        if any(member.state == "running" for member in ranks.values()):
            return False
        present = ranks.keys() - restarts.awaited
        if ranks and len(present) >= self._members.world_size:
            return True
        failed = any(ranks[number].state != "success" for number in present)
        patience = self._parts.settings.restart_timeout if restarts.awaited else self._parts.settings.rank_timeout
        if failed:
            patience = min(self._parts.settings.rank_timeout, lost.FAILED_RANK_GRACE_S)
        return now - self._members.heard >= patience

    def wait_closed(self) -> None:
        """Wait until SwanLab has what was acknowledged and its run is closed, or until that takes too long."""
        deadline = time.monotonic() + CLOSE_DEADLINE_S
        if not self._parts.journal.settled(JOURNAL_DEADLINE_S):
            if self._parts.journal.fenced:
                return  # the run is another writer's now
            self._parts.notices(
                "The journal takes nothing any more; SwanLab's run is closed with what was acknowledged."
            )
            self._parts.reducer.abandon(close=True)
        while not self._parts.reducer.closed and time.monotonic() < deadline:
            time.sleep(0.05)
        if not self._parts.reducer.closed:
            self._parts.notices(
                f"SwanLab did not take everything within {CLOSE_DEADLINE_S:.0f} s; the journal is complete, upload it "
                f"with: swanlab-ray sync {self._parts.journal.directory}"
            )

    def note_closed(self) -> None:
        """Put into the journal what SwanLab has, and that nothing follows."""
        reducer, sink = self._parts.reducer, self._parts.reducer.sink
        self._parts.notes.note()
        self._parts.journal.append(
            Closed(
                written=sink.written,
                thinned=sink.thinned,
                withheld=sink.withheld,
                complete=sink.complete and reducer.closed,
                completions=reducer.completions.taken,
                completions_dropped=reducer.completions_dropped,
                late=reducer.late,
                repeated=reducer.repeated,
            )
        )
