"""A rank's membership in a run: what it said, how far it is, how it ended; and what that makes of the run's end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from swanlab_ray.actors.journal.records import Arrived, Ended
from swanlab_ray.actors.membership.clocks import Skew
from swanlab_ray.actors.runs.account import Account
from swanlab_ray.actors.runs.causes import failures, state_of
from swanlab_ray.actors.runs.summary import KILLED, Life, ledger
from swanlab_ray.actors.wire.events import Outcome, State
from swanlab_ray.actors.wire.messages import Counts, Doing, Process
from swanlab_ray.actors.wire.status import RankStatus


@dataclass(slots=True)
class RankView:
    """What the events of one life of a rank say about it."""

    step: int | None = None
    loss: float | None = None
    own_loss: bool = False
    """``loss`` is the rank's own, not one reduced over ranks."""
    step_time: float | None = None
    outcome: Outcome | None = None
    notices: list[str] = field(default_factory=list)
    """Sentences for the user of this rank that were not sent to it yet."""
    told: list[str] = field(default_factory=list)
    """Those that were: an answer may be lost, so it hears them again with the answer to its goodbye."""


@dataclass(slots=True)
class Member:
    """A rank's membership in the run."""

    process: Process
    """What it said of itself."""
    heard: float  # monotonic
    view: RankView = field(default_factory=RankView)
    next_seq: int = 0
    durable: int = 0
    received: int = 0
    """Events of this life in the journal."""
    state: State | Literal["running", "lost"] = "running"
    error: str | None = None
    ended_ns: int = 0
    counted: Counts = field(default_factory=Counts)
    """As this life said last."""
    earlier: Account = field(default_factory=Account)
    """The account of its earlier lives."""
    restored: bool = False
    """Known from the journal only."""
    left: bool = False
    """It has said goodbye."""
    gone: bool = False
    """The agent of its machine has seen its process end."""
    since: float = 0.0
    """When this life arrived, monotonic."""
    skew: Skew = field(default_factory=Skew)

    def account(self) -> Account:
        """What became of its events, over all its lives."""
        return self.earlier + self.own_account()

    def own_account(self) -> Account:
        """The same of this life."""
        return Account.of(self.received, self.counted)

    def begin(self, now: float) -> None:
        """This life arrives, or comes back after another one; ``now`` is monotonic."""
        self.since, self.view = now, RankView()

    def lose(self, why: str, ended_ns: int) -> None:
        """It went without a word, and took with it what it had logged, by its last sign of life, and not sent."""
        self.state, self.error, self.ended_ns = "lost", why, ended_ns
        counted = self.counted
        lost = counted.logged - self.received - counted.spooled - sum(counted.dropped.values())
        if lost > 0:
            self.counted = counted.model_copy(update={"dropped": counted.dropped | {KILLED: lost}})

    def heed_outcome(self) -> None:
        """It ended as its last event says, if that says so."""
        outcome = self.view.outcome
        if outcome is not None and outcome.state is not None:
            self.state, self.error = outcome.state, outcome.error
            self.ended_ns = self.skew.corrected(outcome.time_ns)

    def end(self) -> Ended:
        """The journal's record of how this life ended."""
        assert self.state != "running"
        return Ended(
            rank=self.process.rank,
            life=self.process.life,
            state=self.state,
            error=self.error,
            ended_ns=self.ended_ns,
            counts=self.counted,
        )

    def status(self, now: float, doing: Doing | None) -> RankStatus:
        """What there is to show; ``now`` is monotonic, ``doing`` is of now."""
        account = self.account()
        return RankStatus(
            rank=self.process.rank,
            host=self.process.host,
            pid=self.process.pid,
            gpu=self.process.gpu,
            state=self.state,
            step=self.view.step,
            loss=self.view.loss,
            step_time=self.view.step_time,
            error=self.error,
            silent=now - self.heard,
            span=doing.span if doing else "",
            idle=doing.idle if doing else None,
            logged=account.counts.logged,
            received=account.received,
            spooled=account.counts.spooled,
            dropped=sum(account.counts.dropped.values()),
            behind=self.skew.seconds,
        )


def verdict(members: Mapping[int, Member], world_size: int) -> tuple[State, str | None]:
    """Success only if every rank finished; else the first failure is the cause. A rank that was told to end is no cause
    where another has failed."""
    bad = failures(members.values())
    if bad:
        first = bad[0]
        where = f"rank {first.process.rank} ({first.process.host}, pid {first.process.pid})"
        if first.state == "lost":
            also = ", ".join(str(r.process.rank) for r in bad[1:] if r.state == "lost")
            return "crashed", f"{where} was lost: {first.error}" + (f"; then lost: rank {also}" if also else "")
        return state_of(first), f"{where}: {first.error or first.state}"
    if set(members) == {0}:
        return "success", None  # a script that connects on rank 0 only
    absent = never_reported(members, world_size) if members else "no rank ever reported"
    return ("crashed", absent) if absent else ("success", None)


def never_reported(members: Mapping[int, Member], world_size: int) -> str | None:
    """Which ranks no hello came from, in words; None where all have said one."""
    absent = sorted(set(range(world_size)) - set(members))
    if not absent:
        return None
    names = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
    return f"of {world_size} ranks, {len(absent)} never reported (rank {names})"


def restored(lives: list[Life], arrived: Arrived, now: float) -> Member:
    """A rank as the journal knows it, from all its lives and the hello of the last one; ``now`` is monotonic."""
    last = lives[-1]
    counts = last.ended.counts if last.ended else Counts()
    rank = Member(
        arrived,
        now,
        next_seq=last.next_seq,
        durable=last.next_seq,
        received=last.events,
        since=now,
        restored=True,
    )
    rank.counted = counts
    rank.earlier = ledger(lives[:-1])
    rank.view.outcome = last.outcome()
    if last.ended is not None:
        rank.state, rank.error, rank.ended_ns = last.ended.state, last.ended.error, last.ended.ended_ns
    return rank
