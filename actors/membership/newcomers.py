"""Who may speak as a rank: a process that says hello as a rank that there is already is a restart, or another job.

What decides is what can be known: the job's nonce and the launcher's attempt, and whether the earlier process is still
heard. Two processes never take turns: as long as one is heard, the other keeps what it logs, and asks again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from swanlab_ray.actors.membership.members import Member
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.messages import BEAT_S, Declined, Hello

QUIET_S = 5 * BEAT_S
"""A process that is not heard for so long makes room for one that asks for its place."""
ASKING_S = 60.0
"""After so long without asking again a process is forgotten that was declined."""


@dataclass(slots=True)
class _Asking:
    first: float
    last: float


class Newcomers:
    """Kept by the writer, whose lock guards it.

    Args:
        run_id: of the run.
        settings: those that the run goes by.
        gone: whether a member's process is known not to exist any more.
    """

    def __init__(self, run_id: str, settings: ObserverSettings, gone: Callable[[Member], bool]) -> None:
        self._run_id = run_id
        self._destination = _destination(settings.public())
        self._gone = gone
        self._asking: dict[str, _Asking] = {}
        self._nonce = ""  # of the process that was let in last
        self._odd: set[str] = set()  # lives of which it was told that their world is of another size

    def decline(self, hello: Hello, ranks: Mapping[int, Member], replaced: bool, now: float) -> Declined | None:
        """Why a process may not report in a life that is not the rank's present one; None where it may.

        Args:
            hello: what it says.
            ranks: the members of the run.
            replaced: another process has taken its place before.
            now: monotonic.
        """
        own = ranks.get(hello.rank)
        if replaced and (own is None or own.state == "success"):
            return Declined(f"Rank {hello.rank} was started again meanwhile: this process came too late to this run.")
        other = self._in_the_way(hello, own, ranks, now)
        elsewhere = self._goes_elsewhere(hello)
        if other is None and not elsewhere:
            self._asking.pop(hello.life, None)
            self._nonce = hello.nonce
            return None
        self._asking = {life: asked for life, asked in self._asking.items() if now - asked.last < ASKING_S}
        asking = self._asking.setdefault(hello.life, _Asking(now, now))
        asking.last = now
        if elsewhere:
            return Declined(
                f"Another job reports under run id '{self._run_id}', to project '{self._destination}', and this one to "
                f"'{_destination(hello.settings or {})}': give each job its own OBSERVER_RUN_ID. What this one logs is "
                "kept until that one has ended."
            )
        assert other is not None
        # Of one that was killed just now something may still be on its way.
        heard_since = other.heard > asking.first + BEAT_S and not other.restored
        return Declined(self._sentence(hello, other) if heard_since else "")

    def _in_the_way(self, hello: Hello, own: Member | None, ranks: Mapping[int, Member], now: float) -> Member | None:
        """Whom this process would displace, or mix with."""
        if own is not None and self._is_there(own, now) and not (_same_job(hello, own) and _later(hello, own)):
            return own
        if hello.nonce and hello.nonce != self._nonce:
            others = (r for r in ranks.values() if r.process.nonce not in ("", hello.nonce) and self._is_there(r, now))
            return next(others, None)
        return None

    def _is_there(self, member: Member, now: float) -> bool:
        return member.state == "running" and now - member.heard < QUIET_S and not self._gone(member)

    def _goes_elsewhere(self, hello: Hello) -> bool:
        """Whether it belongs to a job that reports to another project; within one job that is only a wrong setting."""
        if hello.settings is None or (hello.nonce and hello.nonce == self._nonce):
            return False
        return _destination(hello.settings) != self._destination

    def _sentence(self, hello: Hello, other: Member) -> str:
        who = f"{other.process.host}, pid {other.process.pid}"
        if _same_job(hello, other):
            return (
                f"Another process of this job reports as rank {hello.rank} ({who}): check RANK and WORLD_SIZE, "
                "or give each program its own OBSERVER_RUN_ID. What this one logs is kept until that one has ended."
            )
        return (
            f"Another job reports under run id '{self._run_id}' (rank {other.process.rank}: {who}): give each job its "
            "own OBSERVER_RUN_ID. What this one logs is kept until that one has ended."
        )

    def odd_world_size(self, members: Iterable[Member], now: float) -> Member | None:
        """A rank that came last, and does not agree with others that are there on the world's size; told once."""
        there = [r for r in members if r.state == "running" and not r.restored and now - r.heard < QUIET_S]
        if len({r.process.world_size for r in there}) < 2:
            return None
        last = max(there, key=lambda r: r.since)
        # While a job grows or shrinks its earlier processes are still heard for a moment.
        others = [r.heard for r in there if r.process.world_size != last.process.world_size]
        if max(others) - last.since <= QUIET_S or last.process.life in self._odd:
            return None
        self._odd.add(last.process.life)
        return last


def odd_world(member: Member) -> str:
    """What there is to say of such a rank."""
    return (
        f"Rank {member.process.rank} says the world size is {member.process.world_size}, and other ranks that it is "
        "another: check RANK and WORLD_SIZE, or give each job its own OBSERVER_RUN_ID."
    )


def _same_job(hello: Hello, member: Member) -> bool:
    return bool(hello.nonce) and hello.nonce == member.process.nonce


def _later(hello: Hello, member: Member) -> bool:
    return hello.attempt > member.process.attempt


def _destination(settings: Mapping[str, object]) -> str:
    """Whose experiments they are, such as ``demo`` or ``team/demo``."""
    return "/".join(str(settings[name]) for name in ("workspace", "project") if settings.get(name))
