"""A rank's membership in a run: what it said, how far it is, how it ended; and what that makes of the run's end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from swanlab_ray.actors.history import KILLED, TERMINATED
from swanlab_ray.actors.protocol import Counted, Doing, Hello, RankStatus, State
from swanlab_ray.actors.records import Arrived, Counts, Ended
from swanlab_ray.actors.views import RankView


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

    def account(self) -> tuple[int, Counts]:
        """Events in the journal, and what the rank counted, over all its lives."""
        received, counts = self.earlier
        dropped = dict(counts.dropped)
        for reason, number in self.counted.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + number
        return received + self.received, Counts(
            logged=counts.logged + max(self.counted.logged, self.received),
            spooled=counts.spooled + self.counted.spooled,
            dropped=dropped,
            refused=counts.refused + self.counted.refused,
        )

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
    absent = sorted(set(range(world_size)) - set(members))
    if absent or not members:
        names = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
        return "crashed", f"of {world_size} ranks, {len(absent)} never reported (rank {names})"
    return "success", None


def counts_of(counted: Counted) -> Counts:
    """The journal's form of what a rank has counted."""
    return Counts(**msgspec.structs.asdict(counted))


def counted_of(counts: Counts) -> Counted:
    """What the rank had counted of which the journal tells."""
    return Counted(**counts.model_dump())


def arrived(hello: Hello) -> Arrived:
    """The journal's record of a rank's first hello."""
    return Arrived(
        rank=hello.rank,
        world_size=hello.world_size,
        life=hello.life,
        local_rank=hello.local_rank,
        host=hello.host,
        pid=hello.pid,
        pid_namespace=hello.pid_namespace,
        gpu=hello.gpu,
        restarts=hello.restarts,
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
    )
