"""What a writer finds of a run that had ended, until somebody comes: another job that goes on with it, or a rank that
was lost and is heard again."""

from __future__ import annotations

from swanlab_ray.actors.journal.records import Finished
from swanlab_ray.actors.runs.account import Account
from swanlab_ray.actors.runs.summary import Life, Summary, ledger
from swanlab_ray.actors.settings import ObserverSettings

DESTINATION = (
    "project",
    "workspace",
    "api_host",
    "web_host",
    "rank_series",
    "completion_log_interval",
    "completion_max_buffer",
)
"""Settings that decide which rows go to which experiment."""


class Sessions:
    """The jobs of a run, as its journal tells them.

    Args:
        summary: of the journal; None where there is none, or it cannot be read.
    """

    def __init__(self, summary: Summary | None = None) -> None:
        self.over: Finished | None = None
        """How the run had ended."""
        self.accounts: dict[int, Account] = {}
        """Of ranks, over their lives in jobs that are over."""
        self.present: dict[int, list[Life]] = {}
        """Lives of the ranks of the last job, the latest of each being one of that job."""
        self.world_size = 0
        """As the last rank said that arrived."""
        self._left: set[str] = set()  # lives that have said how they ended
        if summary is None:
            return
        self.world_size = summary.world_size
        if summary.closed is not None:
            self.over = summary.finished
        for number, lives in summary.ranks().items():
            arrived = lives[-1].arrived
            of_this_job = arrived is None or arrived.life in summary.session_lives
            if of_this_job and number < summary.world_size:
                self.present[number] = lives
            else:
                self.accounts[number] = ledger(lives)
        if self.over is not None:
            ends = (life.ended for life in summary.lives.values())
            self._left = {ended.life for ended in ends if ended is not None and ended.state != "lost"}

    def has_left(self, life: str) -> bool:
        """Whether it had said goodbye to a job that is over."""
        return life in self._left

    def lives(self) -> dict[int, str]:
        """The latest life of each rank of the last job."""
        latest = {number: lives[-1].arrived for number, lives in self.present.items()}
        return {number: arrived.life for number, arrived in latest.items() if arrived is not None}

    def go_on(self) -> dict[int, str]:
        """Another job goes on with the run; what there was are accounts. Returns :meth:`lives` until then."""
        latest = self.lives()
        self.accounts |= {number: ledger(lives) for number, lives in self.present.items()}
        self.present = {}
        return latest


def same_place(summary: Summary, settings: ObserverSettings) -> bool:
    """Whether the rows that were delivered went where these settings send them."""
    before, now = summary.headers[-1].settings if summary.headers else {}, settings.public()
    return all(before.get(name) == now.get(name) for name in DESTINATION)
