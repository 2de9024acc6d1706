"""The writer: one named Ray actor per run, the only process that writes SwanLab. This file is what Ray calls.

What arrives goes to the journal; once it is on disk it is acknowledged, decoded
(:mod:`swanlab_ray.actors.journal.decoding`) and carried into SwanLab (:mod:`swanlab_ray.actors.delivery.follow`). A
writer that is restarted finds the journal by the run id.

Ranks reach it through :func:`swanlab_ray.actors.writer.handle.get_or_create`. Batches, each of which is a sign of life
as well, stay in order (one thread, group ``ingest``) and wait for nothing: what may take long, hellos and goodbyes, has
other threads, and so have questions.
"""

from __future__ import annotations

import sys
import time

import ray
from pydantic import SecretStr

from swanlab_ray.actors.delivery.cloud import CloudRun
from swanlab_ray.actors.journal.records import Batch
from swanlab_ray.actors.membership.members import Member
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.locks import hold_lock
from swanlab_ray.actors.wire.messages import (
    Ack,
    Declined,
    Farewell,
    Fenced,
    Goodbye,
    Hello,
    NumberedBatch,
    RunEnded,
    Sign,
    UnknownRank,
)
from swanlab_ray.actors.wire.status import WriterStatus
from swanlab_ray.actors.writer.ending import Ending
from swanlab_ray.actors.writer.parts import Parts
from swanlab_ray.actors.writer.report import Report
from swanlab_ray.actors.writer.telling import Telling
from swanlab_ray.actors.writer.ticker import Ticker

FLUSH_INTERVAL_S = 0.2
"""Seconds between two batches of a rank while the world is small."""
CALLS_PER_SECOND = 1000.0
"""Batches a second the writer asks for at most: it saturates at about 2,800 (two cores, Ray 2.60)."""
BACKLOG_BYTES = 256 << 20
"""Batches that may wait here for the disk; the ranks keep what comes beyond that."""
SETTLE_S = 10.0
"""How long the answer to a goodbye waits until what its rank has sent was looked at, so that it hears of refusals."""
SWITCH_S = 0.0005
"""How long one thread here may keep the others from running, a tenth of Python's own: a batch changes threads several
times until it is acknowledged, and waits this long each time while values are reduced."""
DURABLE_S = 2.0
"""How long the answer to a goodbye waits until that is on disk."""


class Writer:
    """Takes what the ranks send, keeps it in the journal, reduces it over ranks, and writes one SwanLab run.

    Args:
        run_id: identity of the run; also the SwanLab run id.
        settings: as the first rank passed them.
        life_lock: a file this process holds a lock on while it lives, which keeps a cluster alive that the ranks
            started for themselves.
    """

    def __init__(self, run_id: str, settings: ObserverSettings, life_lock: str | None = None) -> None:
        sys.setswitchinterval(SWITCH_S)
        self._life_lock = hold_lock(life_lock) if life_lock else None
        self._parts = parts = Parts(run_id, settings)
        self._members, self._journal = parts.members, parts.journal
        self._ending = Ending(parts)
        self._report = Report(parts, self._ending)
        self._telling = Telling(parts, self._report)
        parts.start()
        self._ticker = Ticker(parts, self._ending, self._report, self._telling)
        self._ticker.start()

    def __repr__(self) -> str:
        return f"SwanLabWriter(project={self._parts.settings.project}, run={self._parts.run_id})"

    @ray.method(concurrency_group="hello")
    def hello(self, hello: Hello) -> Ack | Declined:
        """A rank arrives, or comes back after a broken connection.

        Raises:
            RunEnded: this run is closing.
            Fenced: another writer has taken over.
        """
        self._members.read_on(hello)
        with self._members.lock:
            self._check_open()
            if self._members.has_left(hello.life):
                self._ending.as_it_was()  # nobody needs this writer
                raise RunEnded(self._parts.run_id)
            member = self._members.greet(hello, time.monotonic())
            if isinstance(member, Declined):
                return member
            self._parts.reducer.open()
            return self._ack(member)

    @ray.method(concurrency_group="ingest")
    def ingest(self, sign: Sign, batch: NumberedBatch | None = None) -> Ack:
        """Hear a rank, and take the batch that it sends, if it does.

        Any batch but the one that is due is answered with what is due (go-back-N). The answer says what is on disk so
        far, which this batch need not be yet.

        Raises:
            RunEnded: this run is closing.
            Fenced: another writer has taken over.
            UnknownRank: the rank did not say hello to this incarnation.
        """
        with self._members.lock:
            self._check_open()
            member = self._members.hear(sign, time.monotonic())
            if sign.doing is not None:
                self._parts.health.beat(sign.rank, sign.life, sign.doing, member.heard)
            if batch is not None:
                self._take(member, batch)
            return self._ack(member)

    @ray.method(concurrency_group="ingest")
    def gone(self, rank: int, life: str) -> None:
        """The process of a rank has ended, as the agent of its machine has seen, which had passed on all before."""
        with self._members.lock:
            self._members.gone(rank, life)

    def _take(self, member: Member, batch: NumberedBatch) -> None:
        waiting = self._journal.queued_bytes + self._parts.decoding.backlog
        self._members.last_batch = member.heard
        if batch.seq == member.next_seq and waiting < BACKLOG_BYTES:
            member.next_seq += 1
            rank, life = member.process.rank, member.process.life
            self._journal.append(Batch(rank, life, batch.seq, time.time_ns(), batch.events, batch.data))

    @ray.method(concurrency_group="goodbye")
    def goodbye(self, goodbye: Goodbye) -> Farewell:
        """A rank ends. Answered when that is on disk, or the disk is slow.

        Raises:
            Fenced: another writer has taken over.
            UnknownRank: the run has ended without this rank, which must say hello again.
        """
        if self._parts.decoding.behind() < SETTLE_S:  # so that it still hears of values that were rejected
            self._parts.decoding.settled(SETTLE_S)
        with self._members.lock:
            self._check_not_fenced()
            member = self._members.ranks.get(goodbye.rank)
            notices = []
            if member is not None and member.process.life == goodbye.life:
                if self._ending.outcome is not None and member.state == "lost":
                    raise UnknownRank(f"rank {goodbye.rank} must say hello again")
                self._members.leave(member, goodbye)
                self._take_notices(member)
                notices = list(member.view.told)
            self._ending.look(time.monotonic())
            last, told = self._ending.outcome is not None, self._parts.notices.told
        self._journal.settled(DURABLE_S)
        return Farewell(last, notices, told)

    @ray.method(concurrency_group="query")
    def take_key(self, key: SecretStr, api_host: str | None) -> None:
        """A rank's API key, for where the writer was given none; used for the host that it was given for only."""
        sink = self._parts.reducer.sink
        if isinstance(sink, CloudRun) and api_host == self._parts.settings.api_host:
            sink.offer_key(key)

    @ray.method(concurrency_group="query")
    def status(self) -> WriterStatus:
        """What the writer knows now."""
        return self._report.status()

    def _check_open(self) -> None:
        self._check_not_fenced()
        if self._ending.outcome is not None:
            raise RunEnded(self._parts.run_id)

    def _check_not_fenced(self) -> None:
        if self._journal.fenced:
            raise Fenced(f"another writer has taken over run {self._parts.run_id}")

    def _ack(self, member: Member) -> Ack:
        interval = max(FLUSH_INTERVAL_S, self._members.world_size / CALLS_PER_SECOND)
        return Ack(member.durable, member.next_seq, interval, self._take_notices(member), self._parts.health.asks)

    def _take_notices(self, member: Member) -> list[str]:
        notices, member.view.notices = member.view.notices, []
        if member.process.rank == 0:
            notices = notices + self._parts.notices.take()
        member.view.told += notices
        return notices
