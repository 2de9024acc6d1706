"""What the writer knows, for ``swanlab-ray status``, its log tab and the notifications."""

from __future__ import annotations

import os
import time

from swanlab_ray.actors.runs.summary import KILLED
from swanlab_ray.actors.wire.status import WriterStatus
from swanlab_ray.actors.writer.ending import Ending
from swanlab_ray.actors.writer.parts import Parts


class Report:
    """Puts it together.

    Args:
        parts: of the writer.
        ending: how the run ended.
    """

    def __init__(self, parts: Parts, ending: Ending) -> None:
        self._parts = parts
        self._ending = ending
        self.closed = False
        """SwanLab's run and the journal are closed."""

    def status(self) -> WriterStatus:
        """What it knows now."""
        with self._parts.members.lock:
            return self._status(time.monotonic())

    def _status(self, now: float) -> WriterStatus:
        members = [member for _, member in sorted(self._parts.members.ranks.items())]
        ranks = [member.status(now, self._parts.health.doing(member.process, now)) for member in members]
        accounts = [member.account().counts for member in members]
        losses = [rank.loss for rank in ranks if rank.loss is not None]
        loss, reducer, sink = self._parts.view.loss, self._parts.reducer, self._parts.reducer.sink
        state, error = self._ending.outcome or ("running", None)
        return WriterStatus(
            run_id=self._parts.run_id,
            project=self._parts.settings.project or "",
            experiment=self._parts.settings.experiment_name,
            mode=self._parts.settings.mode,
            state=state,
            error=error,
            closed=self.closed,
            pid=os.getpid(),
            world_size=self._parts.members.world_size,
            ranks=ranks,
            step=max((rank.step for rank in ranks if rank.step is not None), default=None),
            max_steps=self._parts.view.job.max_steps,
            epoch=self._parts.view.job.epoch,
            loss=loss if loss is not None or not losses else sum(losses) / len(losses),
            learning_rate=self._parts.view.learning_rate,
            journal=str(self._parts.directory),
            received=sum(rank.received for rank in ranks),
            written=sink.written,
            thinned=sink.thinned,
            withheld=sink.withheld,
            completions=reducer.completions.taken,
            completions_dropped=reducer.completions_dropped,
            hang=self._parts.health.hang,
            straggler=str(reducer.timings.straggler or "") or None,
            spans_dropped=reducer.timings.dropped,
            late=reducer.late,
            repeated=reducer.repeated,
            rejected=self._parts.view.rejected + sum(account.refused for account in accounts) + reducer.refused,
            spooled=sum(rank.spooled for rank in ranks),
            dropped=sum(rank.dropped for rank in ranks),
            killed=sum(account.dropped.get(KILLED, 0) for account in accounts),
            lag=reducer.lag(),
            run_dir=sink.run_dir,
            url=sink.url,
            notices=list(self._parts.notices.all),
        )
