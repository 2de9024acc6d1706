"""The writer: one named Ray actor per run, the only process that writes SwanLab. This file is its membership: who is
there, what is acknowledged, how it ends.

What arrives goes to the journal; once it is on disk it is acknowledged, looked at
(:mod:`swanlab_ray.actors.writer.progress`) and carried into SwanLab (:mod:`swanlab_ray.actors.delivery.follow`). A
writer that is restarted finds the journal by the run id.

Ranks reach it through :func:`swanlab_ray.actors.writer.handle.get_or_create`. Batches, each of which is a sign of life
as well, stay in order (one thread, group ``ingest``) and wait for nothing: what may take long, hellos and goodbyes, has
other threads, and so have questions.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
from contextlib import suppress

import ray
from pydantic import SecretStr

from swanlab_ray.actors.delivery.cloud import CloudRun
from swanlab_ray.actors.delivery.disk import SwanLabRun
from swanlab_ray.actors.delivery.follow import Reducer
from swanlab_ray.actors.delivery.queue import FINISH_DEADLINE_S, Sink, stderr
from swanlab_ray.actors.health.hangs import Health, why_silent
from swanlab_ray.actors.journal.on_disk import OnDisk
from swanlab_ray.actors.journal.reading import KILLED, Follower
from swanlab_ray.actors.journal.records import (
    REDUCTION_VERSION,
    Alert,
    Batch,
    Closed,
    Counts,
    Delivered,
    Entry,
    Finished,
    Header,
    Notified,
    Opened,
    Returned,
    Tick,
    UnknownFormat,
)
from swanlab_ray.actors.journal.writing import Journal, Position, run_directory
from swanlab_ray.actors.notify.messages import MOVES_AGAIN, ONLY_RANK_0, RESTARTED, Notifications
from swanlab_ray.actors.notify.outbox import open_mailbox
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.events import Event, Stacks, State
from swanlab_ray.actors.wire.locks import hold_lock
from swanlab_ray.actors.wire.messages import BEAT_S, Ack, Declined, Farewell, Goodbye, Hello, NumberedBatch, Sign
from swanlab_ray.actors.wire.secret_shapes import masked
from swanlab_ray.actors.wire.status import WriterStatus, duration, standstill, status_line
from swanlab_ray.actors.wire.version import package_version
from swanlab_ray.actors.writer.clocks import Timeline
from swanlab_ray.actors.writer.differences import Differences
from swanlab_ray.actors.writer.members import Member, arrived, never_reported, plus, restored, verdict
from swanlab_ray.actors.writer.newcomers import Newcomers, odd_world
from swanlab_ray.actors.writer.processes import Processes
from swanlab_ray.actors.writer.progress import Views
from swanlab_ray.actors.writer.restarts import Restarts
from swanlab_ray.actors.writer.sessions import Sessions, same_place

TICK_S = 0.2
ALIVE_TICK_S = 60.0
"""Seconds between two signs of life in a journal in which nothing else is written, for readers on other machines."""
QUIET_TICK_S = 1.0
"""Seconds between two ticks in the journal while values wait for silent ranks."""
STATUS_LINE_S = 5.0
FLUSH_INTERVAL_S = 0.2
"""Seconds between two batches of a rank while the world is small."""
CALLS_PER_SECOND = 1000.0
"""Batches a second the writer asks for at most: it saturates at about 2,800 (two cores, Ray 2.60)."""
BACKLOG_BYTES = 256 << 20
"""Batches that may wait here for the disk; the ranks keep what comes beyond that."""
SETTLE_S = 10.0
"""How long the answer to a goodbye waits until what its rank has sent was looked at, so that it hears of refusals."""
DURABLE_S = 2.0
"""How long the answer to a goodbye waits until that is on disk."""
FAILED_RANK_GRACE_S = 15.0
"""Once one rank has failed, silence this long means that its peers went with it."""
CLOSE_DEADLINE_S = FINISH_DEADLINE_S + 10.0
"""How long the actor stays at the most to work off what was acknowledged and to close the run."""
JOURNAL_DEADLINE_S = 10.0
"""How long the end waits for a disk that takes nothing."""
LARK_DEADLINE_S = 5.0
"""How long the end waits for notifications that are on their way; ranks wait 90 s for all of the end."""
LINGER_S = 3.0
"""How long the actor stays after the end, so that whoever watches reads the final counts."""


class RunEnded(Exception):
    """The run is closing. Whoever still wants to write needs a new writer."""


class Fenced(Exception):
    """A newer writer has taken over the run; this one acknowledges nothing any more."""


class Unknown(Exception):
    """This writer does not know the rank in this life, or from its journal only: it must say hello."""


class Writer:
    """Takes what the ranks send, keeps it in the journal, reduces it over ranks, and writes one SwanLab run.

    Args:
        run_id: identity of the run; also the SwanLab run id.
        settings: as the first rank passed them.
        life_lock: a file this process holds a lock on while it lives, which keeps a cluster alive that the ranks
            started for themselves.
    """

    def __init__(self, run_id: str, settings: ObserverSettings, life_lock: str | None = None) -> None:
        self._run_id = run_id
        self._settings = settings
        self._life_lock = hold_lock(life_lock) if life_lock else None
        self._lock = threading.Lock()
        self._ranks: dict[int, Member] = {}
        self._world_size = 0
        self._notices: list[str] = []
        self._told = 0  # of the run's notices, how many rank 0 has seen
        self._end: tuple[State, str | None] | None = None
        self._before_ns = 0  # when the run's job before this one had ended
        self._sessions = Sessions()
        self._replaced: dict[int, tuple[str, Member | None]] = {}  # the life of each rank whose place was taken last
        self._fenced = self._declined = False
        self._closed = threading.Event()
        self._born = time.monotonic()
        self._last_batch = self._last_tick = self._born
        self._processes = Processes()
        self._views = Views(self._forward, self._take_stacks)
        self._health = Health(settings.hang_timeout, self._processes.state)
        self._restarts = Restarts()
        self._newcomers = Newcomers(run_id, settings, self._processes.gone)
        self._differences = Differences(settings)
        self._clock = Timeline()
        self._reducer: Reducer | None = None  # opened with the first rank
        self._directory = run_directory(settings.log_dir, run_id)
        self._run_dirs: list[str] = []
        self._rows = self._rows_noted = 0
        self._rows_noted_at = 0.0
        self._begun = self._committed = Position(0, 0)
        self._journal = Journal(self._directory, self._header, self._on_commit, self._on_trouble, self._on_fenced)
        self._on_disk = OnDisk(self._journal)
        self._mailbox = open_mailbox(settings, self._notice, lambda key: self._journal.append(Notified(key=key)))
        self._notifications = Notifications(self._mailbox, self._notice)
        self._recover()
        self._journal.start()
        threading.Thread(target=self._tick_forever, name="writer-ticker", daemon=True).start()

    def __repr__(self) -> str:
        return f"SwanLabWriter(project={self._settings.project}, run={self._run_id})"

    def _header(self, epoch: int) -> Header:
        return Header(
            kind="journal",
            run_id=self._run_id,
            epoch=epoch,
            host=socket.gethostname(),
            pid=os.getpid(),
            settings=self._settings.public(),
            package=package_version(),
            reduction_version=REDUCTION_VERSION,
        )

    # Taking over a run that has a journal.

    def _recover(self) -> None:
        """Rebuild what an earlier incarnation knew, from its journal."""
        earlier = self._journal.earlier
        self._begun = self._committed = Position(self._journal.epoch or max(earlier, default=0) + 1, 0)
        began = time.monotonic()
        try:
            summary = self._on_disk.read()
        except (OSError, UnknownFormat) as error:
            self._notice(f"The journal of this run cannot be read ({error}); what it has is not in SwanLab's run.")
            return
        if not earlier or summary is None:
            return
        self._on_disk.join(summary)
        self._begun = Position(0, 0)
        self._clock = Timeline(summary.last_ns)
        damaged = any(not found.damage.torn for found in summary.damaged)
        if not damaged and same_place(summary, self._settings):
            self._rows = self._rows_noted = summary.rows.get(REDUCTION_VERSION, 0)
        self._run_dirs = [opened.run_dir for opened in summary.opened if opened.run_dir]
        self._world_size = summary.world_size
        self._sessions = Sessions(summary)
        over = self._sessions.over
        self._before_ns = over.time_ns if over is not None else summary.before_ns
        if over is not None:
            self._notifications = Notifications(self._mailbox, self._notice, began=self._clock.now(), again=True)
        else:
            self._restarts.count = sum(alert.text.startswith(RESTARTED) for alert in summary.alerts)
            self._notifications = Notifications(
                self._mailbox,
                self._notice,
                summary.notified,
                {alert.text for alert in summary.alerts},
                summary.session_ns / 1e9 or None,  # nobody had said hello yet
                again=summary.sessions > 1,
            )
        if over is None:
            self._restore()
        if damaged:
            self._notice(f"The journal of this run is damaged; see: swanlab-ray verify {self._directory}")
        if over is not None:
            pass  # unless a rank comes: a training that goes on
        elif summary.finished is not None:
            self._end = (summary.finished.state, summary.finished.error)
            self._open_reducer(summary.finished)
        elif self._ranks:
            self._open_reducer()
        stderr(
            f"the journal has {summary.events} events of {len(summary.ranks())} ranks "
            f"(read in {time.monotonic() - began:.1f} s): {self._directory}"
        )

    def _restore(self) -> None:
        """The ranks of the last job are members again, those whose hello no damage took."""
        for number, lives in self._sessions.present.items():
            if lives[-1].arrived is not None:
                view = self._views.restart_rank(number, lives[-1].arrived.life)
                self._ranks[number] = restored(lives, lives[-1].arrived, view, time.monotonic())

    def _open_reducer(self, finished: Finished | None = None) -> None:
        self._reducer = Reducer(
            Follower(self._directory, self._begun),
            self._committed,
            self._make_sink,
            self._settings,
            self._notice,
            finished,
            self._before_ns,
        )

    def _make_sink(self) -> Sink:
        if self._settings.mode == "cloud":
            return CloudRun(
                self._settings,
                self._run_id,
                self._rows,
                str(self._directory),
                self._delivered,
                self._notice,
                self._opened,
            )
        return SwanLabRun(self._settings, self._run_id, list(self._run_dirs), self._notice, self._opened)

    def _opened(self, sink: Sink) -> None:
        if sink.run_dir:
            self._run_dirs.append(sink.run_dir)
        self._journal.append(Opened(mode=sink.mode, run_dir=sink.run_dir, url=sink.url))
        self._journal.settled(DURABLE_S)

    def _delivered(self, rows: int) -> None:
        self._rows = rows
        if time.monotonic() - self._rows_noted_at > QUIET_TICK_S:
            self._note_rows()

    def _note_rows(self) -> None:
        if self._rows > self._rows_noted:
            self._rows_noted, self._rows_noted_at = self._rows, time.monotonic()
            self._journal.append(Delivered(rows=self._rows, reduction_version=REDUCTION_VERSION))

    # What the journal's thread reports.

    def _on_commit(self, committed: list[tuple[Entry, Position]]) -> None:
        with self._lock:
            for entry, position in committed:
                self._committed = position
                if isinstance(entry, Batch):
                    self._on_disk.take(entry)
                    rank = self._ranks.get(entry.rank)
                    if rank is None or rank.hello.life != entry.life:
                        life, rank = self._replaced.get(entry.rank, ("", None))
                        rank = rank if life == entry.life else None
                    if rank is not None:
                        rank.durable = entry.seq + 1
                        rank.received = self._on_disk.events((entry.rank, entry.life))
            # In order with a reducer that is being opened: it begins with what is committed by then.
            self._views.put(committed)

    def _forward(self, entry: Entry, events: list[Event] | None, position: Position) -> None:
        if self._reducer is not None:
            self._reducer.put(entry, events, position)

    def _on_trouble(self, error: OSError | None) -> None:
        if error is None:
            self._notice("The journal is written again.")
            return
        self._notice(
            f"The journal cannot be written in {self._directory} ({error.strerror or error}). The training goes on; "
            "ranks keep what they log, in memory and then on their own disks, until it can."
        )

    def _on_fenced(self) -> None:
        with self._lock:
            self._fenced = True
        self._notice(
            f"Another writer has taken over run {self._run_id}; this one (pid {os.getpid()}) has stopped. If these are "
            "two jobs, give each its own OBSERVER_RUN_ID."
        )
        if self._reducer is not None:
            self._reducer.abandon(close=False)

    # What ranks call.

    @ray.method(concurrency_group="hello")
    def hello(self, hello: Hello) -> Ack | Declined:
        """A rank arrives, or comes back after a broken connection.

        Raises:
            RunEnded: this run is closing.
            Fenced: another writer has taken over.
        """
        self._read_on(hello)
        with self._lock:
            self._check_open()
            if self._sessions.over is not None and not self._ranks:
                self._look_back(hello, self._sessions.over)
            now = time.monotonic()
            known = self._ranks.get(hello.rank)
            if known is None or known.hello.life != hello.life:
                replaced = self._replaced.get(hello.rank, ("", None))[0] == hello.life
                declined = self._newcomers.decline(hello, self._ranks, replaced, now)
                if declined is not None:
                    if declined.sentence and not replaced:
                        self._note_declined(hello)
                    return declined
                known = self._arrive(hello, known)
            elif known.state != "running":
                self._come_back(known)
            if known.restored or not known.next_seq:  # it has sent nothing to this incarnation
                self._take_up(hello, known)
            known.hello, known.heard, known.restored, known.left = hello, now, False, False
            known.skew.heard(hello.sent_ns, self._clock.now_ns())
            if self._reducer is None:
                self._open_reducer()
            return self._ack(known)

    def _look_back(self, hello: Hello, over: Finished) -> None:
        """The run had ended: whoever says hello now begins another job of it, or was lost and is heard again."""
        if self._sessions.has_left(hello.life):
            self._end = over.state, over.error  # nobody needs this writer
            raise RunEnded(self._run_id)  # the rank was there, and missed the answer to its goodbye
        if self._sessions.lives().get(hello.rank) == hello.life:
            self._sessions.over = None  # it had not ended: all are judged again when this one has
            self._restore()
        else:
            self._replaced |= {number: (life, None) for number, life in self._sessions.go_on().items()}

    def _note_declined(self, hello: Hello) -> None:
        if not self._declined:
            self._declined = True
            self._notice(
                f"Another process ({hello.host}, pid {hello.pid}) wants to report as rank {hello.rank}, and may not: "
                "give each job its own OBSERVER_RUN_ID, or check RANK and WORLD_SIZE."
            )

    def _arrive(self, hello: Hello, earlier: Member | None) -> Member:
        self._restarts.awaited.discard(hello.rank)
        view = self._views.restart_rank(hello.rank, hello.life)
        life, before = self._replaced.get(hello.rank, ("", None))
        before = before if life == hello.life else None
        account = self._sessions.accounts.get(hello.rank, (0, Counts()))
        rank = before or Member(hello, 0.0, view, earlier=account)
        rank.since, rank.view = time.monotonic(), view
        if earlier is not None:
            sentence = self._restarts.note(earlier, self._ranks)
            if sentence is not None:
                self._notice(sentence)
            self._replace(earlier, "it was started again")
            rank.earlier = plus(before.earlier, earlier.own_account()) if before else earlier.account()
        if hello.world_size != self._world_size:
            others = [r for r in self._ranks.values() if r.state == "running" and not r.restored]
            alone = earlier is not None or all(r.hello.world_size == hello.world_size for r in others)
            self._world_size = hello.world_size if alone else max(self._world_size, hello.world_size)
            for number in [n for n in self._ranks if n >= self._world_size]:  # of a larger world that is gone
                self._replace(self._ranks.pop(number), f"the job goes on with {self._world_size} ranks")
        self._ranks[hello.rank] = rank
        self._journal.append(arrived(hello, self._clock.now_ns()))
        if before is not None:
            self._come_back(rank)
        for sentence in self._differences.look(hello):
            rank.view.notices.append(sentence)
            stderr(sentence)
        stderr(f"rank {hello.rank} of {hello.world_size}: {hello.host}, pid {hello.pid}, {hello.gpu or 'CPU'}")
        return rank

    def _replace(self, member: Member, why: str) -> None:
        """Another process has come in its place, or nobody will."""
        self._replaced[member.hello.rank] = member.hello.life, member
        if member.state == "running":
            member.state, member.error, member.ended_ns = "lost", why, self._clock.now_ns()
            member.count_killed()
            self._note_end(member)

    def _come_back(self, rank: Member) -> None:
        """A rank that counted as lost, or had said how it would end, is heard again."""
        rank.state, rank.error = "running", None
        self._journal.append(Returned(rank=rank.hello.rank, life=rank.hello.life))

    def _read_on(self, hello: Hello) -> None:
        """The rank was told that batches are on disk which this incarnation has not read: that has failed, or an
        earlier one has written on. Without the lock, since it may take long; signs of life are answered meanwhile."""
        with self._lock:
            if hello.next_seq <= self._on_disk.next((hello.rank, hello.life)):
                return
        try:
            summary = self._on_disk.read()
        except (OSError, UnknownFormat):
            return
        if summary is not None:
            with self._lock:
                self._on_disk.join(summary)

    def _take_up(self, hello: Hello, rank: Member) -> None:
        """Begin where this rank's batches on disk end, as far as it can send what follows."""
        life = hello.rank, hello.life
        after = self._on_disk.next(life)
        if hello.next_seq > after and self._on_disk.readable:
            self._notice(
                f"Batches {after} to {hello.next_seq - 1} of rank {hello.rank} are in the journal of an "
                f"earlier writer that is not here ({self._directory}): it was on another machine. Give swanlab-ray "
                "sync both directories, or put log_dir on a shared disk."
            )
        rank.next_seq = rank.durable = self._on_disk.due(hello)
        rank.received = self._on_disk.events(life)

    @ray.method(concurrency_group="ingest")
    def ingest(self, sign: Sign, batch: NumberedBatch | None = None) -> Ack:
        """Hear a rank, and take the batch that it sends, if it does.

        Any batch but the one that is due is answered with what is due (go-back-N). The answer says what is on disk so
        far, which this batch need not be yet.

        Raises:
            RunEnded: this run is closing.
            Fenced: another writer has taken over.
            Unknown: the rank did not say hello to this incarnation.
        """
        with self._lock:
            self._check_open()
            rank = self._ranks.get(sign.rank)
            if rank is None or rank.hello.life != sign.life or rank.restored:
                raise Unknown(f"rank {sign.rank} has not said hello to this writer in this life")
            self._hear(rank, sign)
            if batch is not None:
                self._take_batch(rank, batch)
            return self._ack(rank)

    def _hear(self, rank: Member, sign: Sign) -> None:
        rank.heard = time.monotonic()
        rank.counted = sign.counted
        rank.skew.heard(sign.sent_ns, self._clock.now_ns())
        if sign.doing is not None:
            self._health.beat(sign.rank, sign.life, sign.doing, rank.heard)
        if rank.state != "running" and not rank.left:
            self._come_back(rank)

    def _take_batch(self, rank: Member, batch: NumberedBatch) -> None:
        self._last_batch = rank.heard
        if batch.seq == rank.next_seq and self._journal.queued_bytes + self._views.backlog < BACKLOG_BYTES:
            rank.next_seq += 1
            hello = rank.hello
            self._journal.append(Batch(hello.rank, hello.life, batch.seq, time.time_ns(), batch.events, batch.data))

    @ray.method(concurrency_group="goodbye")
    def goodbye(self, goodbye: Goodbye) -> Farewell:
        """A rank ends. Answered when that is on disk, or the disk is slow."""
        if self._views.behind() < SETTLE_S:  # so that it still hears of values that were rejected
            self._views.settled(SETTLE_S)
        with self._lock:
            if self._fenced:
                raise Fenced(self._run_id)
            rank = self._ranks.get(goodbye.rank)
            notices = []
            if rank is not None and rank.hello.life == goodbye.life:
                if (
                    self._end is not None and rank.state == "lost"
                ):  # the run has ended without it, which is to be undone
                    raise Unknown(f"rank {goodbye.rank} must say hello again")
                rank.skew.heard(goodbye.sent_ns, self._clock.now_ns())
                rank.state, rank.error, rank.left = goodbye.state, goodbye.error, True
                rank.ended_ns = rank.skew.corrected(goodbye.time_ns)
                rank.counted = goodbye.counted
                rank.heard = time.monotonic()
                if goodbye.state == "success":
                    self._restarts.awaited.discard(goodbye.rank)  # it was not started again, and need not be
                self._take_notices(rank)
                notices = list(rank.view.told)
                self._note_end(rank)
                stderr(f"rank {goodbye.rank} ended: {goodbye.state}{' - ' + goodbye.error if goodbye.error else ''}")
            self._maybe_end()
            last = self._end is not None
        self._journal.settled(DURABLE_S)
        return Farewell(last, notices, self._told)

    @ray.method(concurrency_group="query")
    def take_key(self, key: SecretStr, api_host: str | None) -> None:
        """A rank's API key, for where the writer was given none; used for the host that it was given for only."""
        sink = self._reducer.sink if self._reducer is not None else None
        if isinstance(sink, CloudRun) and api_host == self._settings.api_host:
            sink.offer_key(key)

    @ray.method(concurrency_group="query")
    def status(self) -> WriterStatus:
        """What the writer knows now."""
        with self._lock:
            return self._status()

    def _status(self) -> WriterStatus:
        now = time.monotonic()
        state, error = self._end or ("running", None)
        views = [rank.view for rank in self._ranks.values()]
        losses = [view.loss for view in views if view.loss is not None]
        loss = self._views.loss
        reducer = self._reducer
        sink = reducer.sink if reducer else None
        ranks = [rank.status(now, self._health.doing(rank.hello, now)) for _, rank in sorted(self._ranks.items())]
        return WriterStatus(
            run_id=self._run_id,
            project=self._settings.project or "",
            experiment=self._settings.experiment_name,
            mode=self._settings.mode,
            state=state,
            error=error,
            closed=self._closed.is_set(),
            pid=os.getpid(),
            world_size=self._world_size,
            ranks=ranks,
            step=max((view.step for view in views if view.step is not None), default=None),
            max_steps=self._views.job.max_steps,
            epoch=self._views.job.epoch,
            loss=loss if loss is not None or not losses else sum(losses) / len(losses),
            learning_rate=self._views.learning_rate,
            journal=str(self._directory),
            received=sum(rank.received for rank in ranks),
            written=sink.written if sink else 0,
            thinned=sink.thinned if sink else 0,
            withheld=sink.withheld if sink else 0,
            completions=reducer.completions.taken if reducer else 0,
            completions_dropped=self._completions_dropped(reducer) if reducer else 0,
            hang=self._health.hang,
            straggler=str(reducer.timings.straggler or "") or None if reducer else None,
            spans_dropped=reducer.timings.dropped if reducer else 0,
            late=reducer.late if reducer else 0,
            repeated=reducer.repeated if reducer else 0,
            rejected=self._views.rejected
            + sum(rank.account()[1].refused for rank in self._ranks.values())
            + (reducer.refused if reducer else 0),
            spooled=sum(rank.spooled for rank in ranks),
            dropped=sum(rank.dropped for rank in ranks),
            killed=sum(rank.account()[1].dropped.get(KILLED, 0) for rank in self._ranks.values()),
            lag=reducer.lag() if reducer else 0.0,
            run_dir=sink.run_dir if sink else None,
            url=sink.url if sink else None,
            notices=list(self._notices),
        )

    @staticmethod
    def _completions_dropped(reducer: Reducer) -> int:
        return reducer.completions.dropped + reducer.sink.completions_lost

    # The writer's own clock.

    def _tick_forever(self) -> None:
        """Whatever fails in here, the run ends one day, and this actor with it."""
        self._next_line, self._ticked = 0.0, time.monotonic()
        while True:
            time.sleep(TICK_S)
            try:
                if self._tick(time.monotonic()):
                    break
            except Exception:
                stderr(traceback.format_exc())
        try:
            self._leave()
        except Exception:
            stderr(traceback.format_exc())
        self._closed.set()
        self._die()

    def _tick(self, now: float) -> bool:
        """Whether this writer is done."""
        with self._lock:
            if now - self._ticked > 2 * BEAT_S:  # this process was paused, and could hear nobody
                self._health.paused(now - self._ticked, now)
                for rank in self._ranks.values():
                    rank.heard += now - self._ticked
            self._ticked = now
            if not self._fenced:
                self._notice_lost_ranks(now)
                self._notice_hang(now)
                self._notice_odd_world(now)
                self._maybe_end()
                self._keep_time(now)
            done = self._end is not None or (self._fenced and self._deserted(now))
        if now >= self._next_line and not done:
            self._next_line = now + STATUS_LINE_S
            stderr(status_line(self.status()))
            if not self._fenced:
                self._tell()
        return done

    def _keep_time(self, now: float) -> None:
        """Put time into the journal while nothing else does, for values that wait for silent ranks."""
        quiet = now - max(self._last_batch, self._last_tick)
        waiting = self._reducer is not None and self._reducer.waiting
        if quiet > (QUIET_TICK_S if waiting else ALIVE_TICK_S):
            self._last_tick = now
            self._journal.append(Tick())
        if now - self._rows_noted_at > QUIET_TICK_S:
            self._note_rows()

    def _deserted(self, now: float) -> bool:
        """Whether no rank asks a writer any more that has been replaced."""
        heard = max((rank.heard for rank in self._ranks.values()), default=self._born)
        return now - heard > self._settings.rank_timeout

    def _notice_lost_ranks(self, now: float) -> None:
        failed = any(rank.state not in ("running", "success") for rank in self._ranks.values())
        timeout = min(self._settings.rank_timeout, FAILED_RANK_GRACE_S) if failed else self._settings.rank_timeout
        for number, rank in self._ranks.items():
            if rank.state != "running":
                continue
            silent = now - rank.heard
            gone = silent > 2 * BEAT_S and self._processes.gone(rank)
            # What it sent before may still wait in the pipeline, and say how it ended.
            if (gone or silent > timeout) and self._views.behind() < silent:
                rank.state = "lost"
                # It was heard every BEAT_S at least, so it fell about then; its peers' errors came of it.
                rank.ended_ns = self._clock.now_ns() - int((silent - BEAT_S / 2) * 1e9)
                if gone:
                    rank.error = "its process is gone (killed?)"
                else:
                    state = self._processes.state(rank)
                    rank.error = f"no sign of life for {timeout:.0f} s" + (f": {why_silent(state)}" if state else "")
                outcome = rank.view.outcome
                if outcome is not None and outcome.state is not None:
                    rank.state, rank.error = outcome.state, outcome.error
                    rank.ended_ns = rank.skew.corrected(outcome.time_ns)
                stderr(f"rank {number} is gone: {rank.state}{' - ' + rank.error if rank.error else ''}")
                rank.count_killed()
                self._note_end(rank)

    def _notice_hang(self, now: float) -> None:
        told = self._health.hang
        over = self._health.look(self._ranks.values(), now, self._clock.now())
        hang = self._health.hang
        if hang is not None and hang is not told:
            self._notice(standstill(hang))
        if over is not None:
            self._notice(f"{MOVES_AGAIN} at {time.strftime('%H:%M:%S')}, after {duration(over.seconds)} without one.")

    def _notice_odd_world(self, now: float) -> None:
        odd = self._newcomers.odd_world_size(self._ranks.values(), now)
        if odd is None:
            return
        sentence = odd_world(odd)
        odd.view.notices.append(sentence)
        self._notice(sentence)

    def _take_stacks(self, rank: int, life: str, stacks: Stacks) -> None:
        with self._lock:
            self._health.take(rank, life, stacks)

    def _maybe_end(self) -> None:
        if self._end is not None:
            return
        now = time.monotonic()
        if any(rank.state == "running" for rank in self._ranks.values()):
            return
        present = self._ranks.keys() - self._restarts.awaited
        if not self._ranks or len(present) < self._world_size:
            failed = any(self._ranks[number].state != "success" for number in present)
            patience = self._settings.restart_timeout if self._restarts.awaited else self._settings.rank_timeout
            last = max((rank.heard for rank in self._ranks.values()), default=self._born)
            if now - last < (min(self._settings.rank_timeout, FAILED_RANK_GRACE_S) if failed else patience):
                return
        if (over := self._sessions.over) is not None and not self._ranks:  # nobody came to go on with it
            self._end = over.state, over.error
            return
        state, error = verdict(self._ranks, self._world_size)
        quiet = now - max((rank.heard for rank in self._ranks.values()), default=self._born)
        may_restart = state == "crashed" and self._restarts.may_follow(self._ranks)
        if may_restart and quiet < self._settings.restart_timeout:
            return  # the launcher may start it again
        if state == "success" and never_reported(self._ranks, self._world_size):
            self._notice(f"{ONLY_RANK_0} of {self._world_size} ranks: the end of this run is its word alone.")
        self._end = state, error
        finished = Finished(time_ns=self._clock.now_ns(), state=state, error=error)
        if self._reducer is not None:
            self._reducer.finish(finished)
        self._journal.append(finished)

    def _leave(self) -> None:
        """Close SwanLab's run and the journal."""
        reducer = self._reducer
        if reducer is not None and not self._fenced:
            self._wait_closed(reducer)
            self._tell_end()
            sink = reducer.sink
            complete = sink.complete and reducer.closed
            self._note_rows()
            self._journal.append(
                Closed(
                    written=sink.written,
                    thinned=sink.thinned,
                    withheld=sink.withheld,
                    complete=complete,
                    completions=reducer.completions.taken,
                    completions_dropped=self._completions_dropped(reducer),
                )
            )
        self._journal.close(JOURNAL_DEADLINE_S / 2)

    def _die(self) -> None:
        """Let watchers read the end, and end this actor for good."""
        with suppress(Exception):
            stderr(status_line(self.status()))
        time.sleep(LINGER_S)
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
            # Unlike ray.kill this runs atexit and does not restart the actor.
            ray.get_runtime_context().current_actor.__ray_terminate__.remote()

    def _tell(self) -> None:
        status, now = self.status(), self._clock.now()
        for fired in self._reducer.fired() if self._reducer else ():
            self._notifications.fire(fired, status, now)
        self._notifications.look(status, now)

    def _tell_end(self) -> None:
        try:
            self._tell()
            left = self._notifications.end(self.status(), self._clock.now(), LARK_DEADLINE_S)
        except Exception:  # this actor must end all the same
            stderr(traceback.format_exc())
        else:
            if left:
                self._notice(f"Lark did not take {left} notifications within {LARK_DEADLINE_S:.0f} s.")

    def _wait_closed(self, reducer: Reducer) -> None:
        deadline = time.monotonic() + CLOSE_DEADLINE_S
        if not self._journal.settled(JOURNAL_DEADLINE_S):
            if self._fenced:
                return  # the run is another writer's now
            self._notice("The journal takes nothing any more; SwanLab's run is closed with what was acknowledged.")
            reducer.abandon(close=True)
        while not reducer.closed and time.monotonic() < deadline:
            time.sleep(0.05)
        if not reducer.closed:
            self._notice(
                f"SwanLab did not take everything within {CLOSE_DEADLINE_S:.0f} s; the journal is complete, upload it "
                f"with: swanlab-ray sync {self._directory}"
            )

    # Small helpers, called with the lock held.

    def _check_open(self) -> None:
        if self._fenced:
            raise Fenced(f"another writer has taken over run {self._run_id}")
        if self._end is not None:
            raise RunEnded(self._run_id)

    def _ack(self, rank: Member) -> Ack:
        interval = max(FLUSH_INTERVAL_S, self._world_size / CALLS_PER_SECOND)
        return Ack(rank.durable, rank.next_seq, interval, self._take_notices(rank), self._health.asks)

    def _note_end(self, rank: Member) -> None:
        self._journal.append(rank.end())

    def _notice(self, sentence: str) -> None:
        sentence = masked(sentence)
        if sentence not in self._notices:
            self._notices.append(sentence)
            self._journal.append(Alert(text=sentence))
        stderr(sentence)

    def _take_notices(self, rank: Member) -> list[str]:
        notices, rank.view.notices = rank.view.notices, []
        if rank.hello.rank == 0:
            # What concerns the whole run is told once, on rank 0.
            of_run = self._notices[self._told :]
            self._told += len(of_run)
            notices = notices + of_run
        rank.view.told += notices
        return notices
