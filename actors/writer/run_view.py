"""What the ranks' own events say about them: for the status, and for how a rank ended that is not heard any more."""

from __future__ import annotations

from swanlab_ray.actors.health.hangs import Health
from swanlab_ray.actors.journal.records import Batch
from swanlab_ray.actors.membership.members import RankView
from swanlab_ray.actors.membership.membership import Membership
from swanlab_ray.actors.wire.codec import Rejected
from swanlab_ray.actors.wire.events import JOB, RANK, Event, Outcome, Progress, Scalars, Stacks

LEARNING_RATES = {"learning_rate", "train/learning_rate", "lr"}

REJECTED = 1000
"""Names of values that are not logged, of which each is told; the rest is counted."""


class RunView:
    """Looks at the events of each batch.

    Args:
        members: whose events they are.
        health: is told where ranks stand.
    """

    def __init__(self, members: Membership, health: Health) -> None:
        self._members = members
        self._health = health
        self.job = Progress(0, 0)
        self.loss: float | None = None
        """The job's latest loss: the Trainer's or the user's."""
        self.learning_rate: float | None = None
        self.rejected = 0
        """Values and events that are not logged, since they are no numbers or not understood."""
        self._rejected_keys: set[tuple[str, str]] = set()

    def look(self, batch: Batch, events: list[Event], rejected: list[Rejected]) -> None:
        """See what a batch says."""
        member = self._members.ranks.get(batch.rank)
        if member is None or member.process.life != batch.life:
            return  # of a life that is over
        view = member.view
        self._reject(view, rejected)
        for event in events:
            match event:
                case Scalars():
                    self._look_at(batch.rank, view, event)
                case Progress():
                    view.step = event.step
                    if event.step >= self.job.step or event.max_steps != self.job.max_steps:
                        self.job = event
                case Outcome():
                    view.outcome = event
                case Stacks():
                    with self._members.lock:
                        self._health.take(batch.rank, batch.life, event)

    def _reject(self, view: RankView, rejected: list[Rejected]) -> None:
        for bad in rejected:
            # Of names one sentence each; of whole events, which have none, one for each reason.
            key = (bad.key, bad.reason if bad.whole else "")
            if key in self._rejected_keys or len(self._rejected_keys) > REJECTED:
                continue
            self._rejected_keys.add(key)
            more = f"More than {REJECTED} names are not logged; the rest of them are counted, and not told."
            view.notices.append(bad.sentence if len(self._rejected_keys) <= REJECTED else more)
        self.rejected += len(rejected)

    def _look_at(self, rank: int, view: RankView, scalars: Scalars) -> None:
        """Keep the latest step, loss and step time for the status."""
        if view.step is None or scalars.step > view.step:
            view.step = scalars.step
        values = scalars.values
        loss = values.get("loss", values.get("train/loss"))
        if loss is not None:
            if scalars.scope != JOB:
                view.loss, view.own_loss = loss, True
            elif not view.own_loss:
                view.loss = loss
            if scalars.scope != RANK and rank == 0:
                self.loss = loss
        for name in LEARNING_RATES & values.keys():
            self.learning_rate = values[name]
        if "step_time" in values:
            view.step_time = values["step_time"]
