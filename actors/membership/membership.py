"""The ranks of a run: who arrives, is started again, goes silent and leaves, and what of each is on disk."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

from swanlab_ray.actors.journal.records import Arrived, Batch, Returned, UnknownFormat
from swanlab_ray.actors.journal.writing import Committed, Journal
from swanlab_ray.actors.log import log
from swanlab_ray.actors.membership.clocks import RunClock
from swanlab_ray.actors.membership.differences import Differences
from swanlab_ray.actors.membership.members import Member, restored
from swanlab_ray.actors.membership.newcomers import Newcomers, odd_world
from swanlab_ray.actors.membership.on_disk import OnDisk
from swanlab_ray.actors.membership.processes import Processes
from swanlab_ray.actors.membership.restarts import Restarts
from swanlab_ray.actors.membership.sessions import Sessions
from swanlab_ray.actors.notify.notices import Notices
from swanlab_ray.actors.runs.account import Account
from swanlab_ray.actors.runs.disks import told_of_one_machine
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.messages import Declined, Goodbye, Hello, Sign, UnknownRank


class Membership:
    """Kept by the writer. :attr:`lock` guards it, and all else that ranks are told.

    Args:
        run_id: of the run.
        settings: those that the run goes by.
        journal: takes the entries that tell of members.
        on_disk: which of their batches are there.
        clock: of the run.
        notices: take sentences for the users.
        sessions: the run's jobs so far. Ranks of one that goes on are members again.
        restarts: how often the present one was started again.
    """

    def __init__(
        self,
        run_id: str,
        settings: ObserverSettings,
        journal: Journal,
        on_disk: OnDisk,
        clock: RunClock,
        notices: Notices,
        sessions: Sessions,
        restarts: int,
    ) -> None:
        self.lock = threading.Lock()
        self.ranks: dict[int, Member] = {}
        self.world_size = sessions.world_size
        self.sessions = sessions
        self.restarts = Restarts(restarts)
        self.processes = Processes()
        self._journal = journal
        self._on_disk = on_disk
        self._clock = clock
        self._notices = notices
        self._newcomers = Newcomers(run_id, settings, self.processes.gone)
        self._differences = Differences(settings)
        self._replaced: dict[int, tuple[str, Member | None]] = {}  # the life of each rank whose place was taken last
        self._declined = False
        # Asked now, without the lock: a disk may hang later.
        self._on_one_machine = told_of_one_machine(Path(journal.directory).parents[1], socket.gethostname())
        self._born = self.last_batch = time.monotonic()
        if sessions.over is None:
            self._restore()

    @property
    def heard(self) -> float:
        """When any of them was heard last, monotonic."""
        return max((member.heard for member in self.ranks.values()), default=self._born)

    def committed(self, committed: list[Committed]) -> None:
        """Entries are on disk: the ranks may forget their batches."""
        with self.lock:
            for entry, _ in committed:
                if not isinstance(entry, Batch):
                    continue
                self._on_disk.take(entry)
                member = self._life(entry.rank, entry.life)
                if member is not None:
                    member.durable = entry.seq + 1
                    member.received = self._on_disk.events((entry.rank, entry.life))

    def _life(self, rank: int, life: str) -> Member | None:
        member = self.ranks.get(rank)
        if member is None or member.process.life != life:
            replaced, member = self._replaced.get(rank, ("", None))
            member = member if replaced == life else None
        return member

    def read_on(self, hello: Hello) -> None:
        """The rank was told that batches are on disk which this incarnation has not read: that has failed, or an
        earlier one has written on. Takes the lock only for moments, since reading may take long; signs of life are
        answered meanwhile."""
        with self.lock:
            if hello.next_seq <= self._on_disk.next((hello.rank, hello.life)):
                return
        try:
            summary = self._on_disk.read()
        except (OSError, UnknownFormat):
            return
        if summary is not None:
            with self.lock:
                self._on_disk.join(summary)

    # Called with the lock held.

    def hear(self, sign: Sign, now: float) -> Member:
        """Take a sign of life; ``now`` is monotonic.

        Raises:
            UnknownRank: the rank did not say hello to this incarnation.
        """
        member = self.ranks.get(sign.rank)
        if member is None or member.process.life != sign.life or member.restored:
            raise UnknownRank(f"rank {sign.rank} has not said hello to this writer in this life")
        member.heard = now
        if not member.left:  # else it was sent before the goodbye, which has the final counts
            member.counted = sign.counted
        member.skew.heard(sign.sent_ns, self._clock.now_ns())
        if member.state != "running" and not member.left:
            self._come_back(member)
        return member

    def gone(self, rank: int, life: str) -> None:
        """The process of a rank has ended."""
        member = self.ranks.get(rank)
        if member is not None and member.process.life == life:
            member.gone = True

    def paused(self, seconds: float) -> None:
        """This process stood still, and could hear nobody."""
        for member in self.ranks.values():
            member.heard += seconds

    def has_left(self, life: str) -> bool:
        """Whether it belonged to a job that is over, had said goodbye, and missed the answer to that."""
        return self.sessions.over is not None and not self.ranks and self.sessions.has_left(life)

    def greet(self, hello: Hello, now: float) -> Member | Declined:
        """Let a process in, or in again; ``now`` is monotonic."""
        if self.sessions.over is not None and not self.ranks:
            self._look_back(hello)
        known = self.ranks.get(hello.rank)
        if known is None or known.process.life != hello.life:
            replaced = self._replaced.get(hello.rank, ("", None))[0] == hello.life
            declined = self._newcomers.decline(hello, self.ranks, replaced, now)
            if declined is not None:
                if declined.sentence and not replaced:
                    self._note_declined(hello)
                return declined
            known = self._arrive(hello, known)
        elif known.state != "running":
            self._come_back(known)
        if known.restored or not known.next_seq:  # it has sent nothing to this incarnation
            self._take_up(hello, known)
        known.process, known.heard, known.restored, known.left = hello, now, False, False
        known.skew.heard(hello.sent_ns, self._clock.now_ns())
        return known

    def _look_back(self, hello: Hello) -> None:
        """The run had ended: whoever says hello now begins another job of it, or was lost and is heard again."""
        if self.sessions.lives().get(hello.rank) == hello.life:
            self.sessions.over = None  # it had not ended: all are judged again when this one has
            self._restore()
        else:
            self._replaced |= {number: (life, None) for number, life in self.sessions.go_on().items()}

    def _restore(self) -> None:
        """The ranks of the last job are members again, those whose hello no damage took."""
        for number, lives in self.sessions.present.items():
            if lives[-1].arrived is not None:
                self.ranks[number] = restored(lives, lives[-1].arrived, time.monotonic())

    def _note_declined(self, hello: Hello) -> None:
        if not self._declined:
            self._declined = True
            self._notices(
                f"Another process ({hello.host}, pid {hello.pid}) wants to report as rank {hello.rank}, and may not: "
                "give each job its own OBSERVER_RUN_ID, or check RANK and WORLD_SIZE."
            )

    def _arrive(self, hello: Hello, earlier: Member | None) -> Member:
        self.restarts.awaited.discard(hello.rank)
        life, before = self._replaced.get(hello.rank, ("", None))
        before = before if life == hello.life else None
        member = before or Member(hello, 0.0, earlier=self.sessions.accounts.get(hello.rank, Account()))
        member.begin(time.monotonic())
        if earlier is not None:
            sentence = self.restarts.note(earlier, self.ranks)
            if sentence is not None:
                self._notices(sentence)
            self._replace(earlier, "it was started again")
            member.earlier = before.earlier + earlier.own_account() if before else earlier.account()
        if hello.world_size != self.world_size:
            self._change_world(hello, alone=earlier is not None)
        self.ranks[hello.rank] = member
        self._journal.append(Arrived.of(hello, self._clock.now_ns()))
        if before is not None:
            self._come_back(member)
        self._note_machines(hello)
        for sentence in self._differences.look(hello):
            member.view.notices.append(sentence)
            log(sentence)
        log(f"rank {hello.rank} of {hello.world_size}: {hello.host}, pid {hello.pid}, {hello.gpu or 'CPU'}")
        return member

    def _note_machines(self, hello: Hello) -> None:
        if self._on_one_machine is None or all(one.process.host == hello.host for one in self.ranks.values()):
            return
        self._notices(self._on_one_machine)
        self._on_one_machine = None

    def _change_world(self, hello: Hello, alone: bool) -> None:
        others = [member for member in self.ranks.values() if member.state == "running" and not member.restored]
        agreed = alone or all(member.process.world_size == hello.world_size for member in others)
        self.world_size = hello.world_size if agreed else max(self.world_size, hello.world_size)
        for number in [number for number in self.ranks if number >= self.world_size]:  # of a larger world that is gone
            self._replace(self.ranks.pop(number), f"the job goes on with {self.world_size} ranks")

    def _replace(self, member: Member, why: str) -> None:
        """Another process has come in its place, or nobody will."""
        self._replaced[member.process.rank] = member.process.life, member
        if member.state == "running":
            member.lose(why, self._clock.now_ns())
            self.note_end(member)

    def _come_back(self, member: Member) -> None:
        """A rank that counted as lost, or had said how it would end, is heard again."""
        member.state, member.error = "running", None
        self._journal.append(Returned(rank=member.process.rank, life=member.process.life))

    def _take_up(self, hello: Hello, member: Member) -> None:
        """Begin where this rank's batches on disk end, as far as it can send what follows."""
        life = hello.rank, hello.life
        after = self._on_disk.next(life)
        if hello.next_seq > after and self._on_disk.readable:
            self._notices(
                f"Batches {after} to {hello.next_seq - 1} of rank {hello.rank} are in the journal of an earlier writer "
                f"that is not here ({self._journal.directory}): it was on another machine. Give swanlab-ray sync both "
                "directories, or put log_dir on a shared disk."
            )
        member.next_seq = member.durable = self._on_disk.due(hello)
        member.received = self._on_disk.events(life)

    def leave(self, member: Member, goodbye: Goodbye) -> None:
        """A rank has said how it ended."""
        member.skew.heard(goodbye.sent_ns, self._clock.now_ns())
        member.state, member.error, member.left = goodbye.state, goodbye.error, True
        member.ended_ns = member.skew.corrected(goodbye.ended_ns)
        member.counted = goodbye.counts
        member.heard = time.monotonic()
        if goodbye.state == "success":
            self.restarts.awaited.discard(goodbye.rank)  # it was not started again, and need not be
        self.note_end(member)
        log(f"rank {goodbye.rank} ended: {goodbye.state}{' - ' + goodbye.error if goodbye.error else ''}")

    def note_end(self, member: Member) -> None:
        """Put into the journal how a life ended."""
        self._journal.append(member.end())

    def notice_odd_world(self, now: float) -> None:
        """Tell of a rank that does not agree with others on the world's size; ``now`` is monotonic."""
        odd = self._newcomers.odd_world_size(self.ranks.values(), now)
        if odd is not None:
            sentence = odd_world(odd)
            odd.view.notices.append(sentence)
            self._notices(sentence)
