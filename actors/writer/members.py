"""A rank's membership in a run: what it said, how far it is, how it ended; and what that makes of the run's end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from swanlab_ray.actors.journal.reading import KILLED, TERMINATED, Life, ledger
from swanlab_ray.actors.journal.records import Arrived, Counts, Ended
from swanlab_ray.actors.wire.events import State
from swanlab_ray.actors.wire.messages import Counted, Doing, Hello
from swanlab_ray.actors.wire.status import RankStatus
from swanlab_ray.actors.writer.clocks import Skew
from swanlab_ray.actors.writer.progress import RankView


@dataclass(slots=True)
class Member:
    """A rank's membership in the run."""

    hello: Hello
    heard: float  # monotonic
    view: RankView
    next_seq: int = 0
    durable: int = 0
    received: int = 0
    """Events of this life in the journal."""
    state: State | Literal["running", "lost"] = "running"
    error: str | None = None
    ended_ns: int = 0
    counted: Counted = field(default_factory=lambda: Counted(0, 0, {}))
    """As this life said last."""
    earlier: tuple[int, Counts] = (0, Counts())
    """The account of its earlier lives."""
    restored: bool = False
    """Known from the journal only."""
    left: bool = False
    """It has said goodbye."""
    since: float = 0.0
    """When this life arrived, monotonic."""
    skew: Skew = field(default_factory=Skew)

    def account(self) -> tuple[int, Counts]:
        """Events in the journal, and what the rank counted, over all its lives."""
        return plus(self.earlier, self.own_account())

    def own_account(self) -> tuple[int, Counts]:
        """The same of this life."""
        counts = counts_of(self.counted)
        return self.received, counts.model_copy(update={"logged": max(counts.logged, self.received)})

    def count_killed(self) -> None:
        """Count what the rank had logged, by its last sign of life, and took with it."""
        counted = self.counted
        lost = counted.logged - self.received - counted.spooled - sum(counted.dropped.values())
        if lost > 0:
            self.counted = msgspec.structs.replace(counted, dropped=counted.dropped | {KILLED: lost})

    def end(self) -> Ended:
        """The journal's record of how this life ended."""
        assert self.state != "running"
        return Ended(
            rank=self.hello.rank,
            life=self.hello.life,
            state=self.state,
            error=self.error,
            ended_ns=self.ended_ns,
            counts=counts_of(self.counted),
        )

    def status(self, now: float, doing: Doing | None) -> RankStatus:
        """What there is to show; ``now`` is monotonic, ``doing`` is of now."""
        received, counts = self.account()
        return RankStatus(
            rank=self.hello.rank,
            host=self.hello.host,
            pid=self.hello.pid,
            gpu=self.hello.gpu,
            state=self.state,
            step=self.view.step,
            loss=self.view.loss,
            step_time=self.view.step_time,
            error=self.error,
            silent=now - self.heard,
            span=doing.span if doing else "",
            idle=doing.idle if doing else None,
            logged=counts.logged,
            received=received,
            spooled=counts.spooled,
            dropped=sum(counts.dropped.values()),
        )


def plus(one: tuple[int, Counts], other: tuple[int, Counts]) -> tuple[int, Counts]:
    """Two accounts in one."""
    (received, first), (also, second) = one, other
    dropped = dict(first.dropped)
    for reason, number in second.dropped.items():
        dropped[reason] = dropped.get(reason, 0) + number
    return received + also, Counts(
        logged=first.logged + second.logged,
        spooled=first.spooled + second.spooled,
        dropped=dropped,
        refused=first.refused + second.refused,
    )


def verdict(members: Mapping[int, Member], world_size: int) -> tuple[State, str | None]:
    """Success only if every rank finished; else the first failure is the cause. A rank that was told to end is no cause
    where another has failed."""
    bad = sorted(
        (r for r in members.values() if r.state != "success"),
        key=lambda r: ((r.error or "").startswith(TERMINATED), r.ended_ns),
    )
    if bad:
        first = bad[0]
        where = f"rank {first.hello.rank} ({first.hello.host}, pid {first.hello.pid})"
        if first.state == "lost":
            also = ", ".join(str(r.hello.rank) for r in bad[1:] if r.state == "lost")
            return "crashed", f"{where} was lost: {first.error}" + (f"; then lost: rank {also}" if also else "")
        state: State = "aborted" if first.state == "aborted" else "crashed"
        return state, f"{where}: {first.error or first.state}"
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


def counts_of(counted: Counted) -> Counts:
    """The journal's form of what a rank has counted."""
    return Counts(**msgspec.structs.asdict(counted))


def counted_of(counts: Counts) -> Counted:
    """What the rank had counted of which the journal tells."""
    return Counted(**counts.model_dump())


def arrived(hello: Hello, time_ns: int | None = None) -> Arrived:
    """The journal's record of a rank's first hello, which came at ``time_ns``; by default now."""
    return Arrived(
        time_ns=time_ns or time.time_ns(),
        rank=hello.rank,
        world_size=hello.world_size,
        life=hello.life,
        local_rank=hello.local_rank,
        host=hello.host,
        pid=hello.pid,
        pid_namespace=hello.pid_namespace,
        gpu=hello.gpu,
        restarts=hello.restarts,
        attempt=hello.attempt,
        nonce=hello.nonce,
        version=hello.version,
    )


def hello_of(arrived: Arrived) -> Hello:
    """The hello of which the journal tells."""
    return Hello(
        rank=arrived.rank,
        world_size=arrived.world_size,
        local_rank=arrived.local_rank,
        host=arrived.host,
        pid=arrived.pid,
        pid_namespace=arrived.pid_namespace,
        gpu=arrived.gpu,
        life=arrived.life,
        next_seq=0,
        restarts=arrived.restarts,
        attempt=arrived.attempt,
        nonce=arrived.nonce,
        version=arrived.version,
    )


def restored(lives: list[Life], arrived: Arrived, view: RankView, now: float) -> Member:
    """A rank as the journal knows it, from all its lives and the hello of the last one; ``now`` is monotonic."""
    last = lives[-1]
    counts = last.ended.counts if last.ended else Counts()
    rank = Member(hello_of(arrived), now, view, last.next_seq, last.next_seq, last.events, since=now, restored=True)
    rank.counted = counted_of(counts)
    rank.earlier = ledger(lives[:-1])
    rank.view.outcome = last.outcome()
    if last.ended is not None:
        rank.state, rank.error, rank.ended_ns = last.ended.state, last.ended.error, last.ended.ended_ns
    return rank
