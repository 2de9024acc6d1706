"""The writer: one named Ray actor per run, the only process that writes SwanLab. This file is its membership: who is
there, what was acknowledged, how it ends; :mod:`swanlab_ray.actors.pipeline` does the writing.

Ranks reach it through :func:`get_or_create`. What arrives stays in order (one thread, group ``io``); signs of life and
questions are answered beside it (group ``query``), so a full batch never delays them.
"""

from __future__ import annotations

import threading
import time
import traceback
from dataclasses import dataclass
from typing import Any

import ray

from swanlab_ray.actors.locks import hold_lock, pid_namespace
from swanlab_ray.actors.pipeline import Pipeline, RankView
from swanlab_ray.actors.protocol import (
    ACTOR_PREFIX,
    BEAT_S,
    NAMESPACE,
    Ack,
    Beat,
    Farewell,
    Goodbye,
    Hello,
    RankStatus,
    State,
    Welcome,
    WriterStatus,
)
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.status import status_line
from swanlab_ray.actors.swanlab_run import stderr

TICK_S = 0.2
STATUS_LINE_S = 5.0
FLUSH_INTERVAL_S = 0.2
"""Seconds between two batches of a rank while the world is small."""
CALLS_PER_SECOND = 1000.0
"""Batches a second the writer asks for at most: it saturates at about 2,800 (two cores, Ray 2.60)."""
SMALL_BACKLOG_BYTES = 1 << 20
SETTLE_S = 1.0
FAILED_RANK_GRACE_S = 15.0
"""Once one rank has failed, silence this long means that its peers went with it."""
CLOSE_DEADLINE_S = 300.0
"""How long the actor stays at the most to work off what was acknowledged and to close the run."""
LINGER_S = 3.0
"""How long the actor stays after the end, so that whoever watches reads the final counts."""


class RunEnded(Exception):
    """The run is closing. Whoever still wants to write needs a new writer."""


@dataclass(slots=True)
class _Rank:
    """A rank's membership in the run."""

    hello: Hello
    heard: float  # monotonic
    next_seq: int
    view: RankView
    state: str = "running"
    error: str | None = None
    ended_ns: int = 0
    logged: int = 0
    dropped: int = 0


class Writer:
    """Takes what the ranks send, reduces it over ranks, and writes one SwanLab run.

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
        self._ranks: dict[int, _Rank] = {}
        self._world_size = 0
        self._pipeline: Pipeline | None = None  # opened with the first rank
        self._notices: list[str] = []  # shared with the pipeline and the SwanLab run, which only append
        self._told = 0  # of the run's notices, how many rank 0 has seen
        self._end: tuple[State, str | None] | None = None
        self._born = time.monotonic()
        self._pid_namespace = pid_namespace()
        threading.Thread(target=self._tick_forever, name="writer-ticker", daemon=True).start()

    def __repr__(self) -> str:
        return f"SwanLabWriter(project={self._settings.project}, run={self._run_id})"

    # What ranks call, in order.

    @ray.method(concurrency_group="io")
    def hello(self, hello: Hello) -> Welcome:
        """A rank arrives, or comes back after a broken connection.

        Raises:
            RunEnded: this run is closing.
        """
        with self._lock:
            if self._end is not None:
                raise RunEnded(self._run_id)
            if self._pipeline is None:
                self._pipeline = Pipeline(self._settings, self._run_id, self._notices)
                self._world_size = hello.world_size
            known = self._ranks.get(hello.rank)
            if known is None or known.hello.life != hello.life:
                known = self._arrive(hello, known)
            elif known.state == "lost":
                known.state = "running"
            known.hello, known.heard = hello, time.monotonic()
            if hello.next_seq > known.next_seq:
                # An earlier incarnation of this writer acknowledged these.
                self._notice(
                    f"{hello.next_seq - known.next_seq} batches of rank {hello.rank} went to a writer that is gone: "
                    "what it had not written yet is lost."
                )
                known.next_seq = hello.next_seq
            self._members_changed()
            return Welcome(
                next_seq=known.next_seq,
                flush_interval=self._flush_interval(),
                notices=self._take_notices(known),
            )

    def _arrive(self, hello: Hello, earlier: _Rank | None) -> _Rank:
        pipeline = self._opened
        pipeline.restart_rank(hello.rank)
        rank = _Rank(hello, time.monotonic(), 0, pipeline.ranks[hello.rank])
        if earlier is not None:
            rank.view.received, rank.dropped = earlier.view.received, earlier.dropped
            if earlier.state == "running" and self._alive(earlier) is not False:
                self._notice(
                    f"Rank {hello.rank} said hello twice, from {earlier.hello.host} (pid {earlier.hello.pid}) and from "
                    f"{hello.host} (pid {hello.pid}): if these are two jobs, give each its own OBSERVER_RUN_ID."
                )
        if hello.world_size != self._world_size:
            others = [r for r in self._ranks.values() if r.state == "running" and r.hello.rank != hello.rank]
            if others:
                sentence = (
                    f"Rank {hello.rank} says the world size is {hello.world_size}, but the run began with "
                    f"{self._world_size}: check RANK and WORLD_SIZE, or give each job its own OBSERVER_RUN_ID."
                )
                rank.view.notices.append(sentence)
                self._notice(sentence)
            self._world_size = hello.world_size if not others else max(self._world_size, hello.world_size)
        self._ranks[hello.rank] = rank
        stderr(f"rank {hello.rank} of {hello.world_size}: {hello.host}, pid {hello.pid}, {hello.gpu or 'CPU'}")
        return rank

    @ray.method(concurrency_group="io")
    def ingest(self, rank: int, life: str, seq: int, batch: bytes) -> Ack:
        """Take a batch; anything but the one that is due is answered with what is due (go-back-N).

        Raises:
            RunEnded: this run is closing.
            KeyError: the rank did not say hello to this incarnation.
        """
        with self._lock:
            if self._end is not None:
                raise RunEnded(self._run_id)
            sender = self._ranks[rank]
            if sender.hello.life != life:
                raise KeyError(f"rank {rank} has a newer life")
            sender.heard = time.monotonic()
            if sender.state == "lost":
                sender.state = "running"
                self._members_changed()
            if seq == sender.next_seq:
                sender.next_seq += 1
                self._opened.put(rank, batch)
            return Ack(sender.next_seq, self._flush_interval(), self._take_notices(sender))

    @ray.method(concurrency_group="io")
    def goodbye(self, goodbye: Goodbye) -> Farewell:
        """A rank ends."""
        if self._pipeline is not None and self._pipeline.backlog < SMALL_BACKLOG_BYTES:
            self._pipeline.settled(SETTLE_S)  # so that it still hears of values that were rejected
        with self._lock:
            rank = self._ranks.get(goodbye.rank)
            notices = []
            if rank is not None and rank.hello.life == goodbye.life:
                rank.state, rank.error, rank.ended_ns = goodbye.state, goodbye.error, goodbye.time_ns
                rank.logged, rank.dropped = goodbye.logged, goodbye.dropped
                rank.heard = time.monotonic()
                notices = self._take_notices(rank)
                self._members_changed()
                stderr(f"rank {goodbye.rank} ended: {goodbye.state}{' - ' + goodbye.error if goodbye.error else ''}")
            self._maybe_end()
            return Farewell(self._end is not None, notices)

    # What is answered beside them.

    @ray.method(concurrency_group="query")
    def beat(self, beat: Beat) -> bool:
        """A sign of life. False: this writer does not know the rank, which must say hello again."""
        with self._lock:
            rank = self._ranks.get(beat.rank)
            if rank is None or rank.hello.life != beat.life:
                return False
            rank.heard = time.monotonic()
            rank.logged, rank.dropped = beat.logged, beat.dropped
            if rank.state == "lost":
                rank.state = "running"
                self._members_changed()
            return self._end is None

    @ray.method(concurrency_group="query")
    def status(self) -> WriterStatus:
        """What the writer knows now."""
        with self._lock:
            return self._status()

    def _status(self) -> WriterStatus:
        now, pipeline = time.monotonic(), self._pipeline
        state, error = self._end or ("running", None)
        views = [rank.view for rank in self._ranks.values()]
        losses = [view.loss for view in views if view.loss is not None]
        loss = pipeline.loss if pipeline else None
        run = pipeline.run if pipeline else None
        return WriterStatus(
            run_id=self._run_id,
            project=self._settings.project or "",
            experiment=self._settings.experiment_name,
            mode=run.mode if run else self._settings.mode,
            state=state,
            error=error,
            closed=run is not None and run.closed.is_set(),
            world_size=self._world_size,
            ranks=[self._rank_status(number, rank, now) for number, rank in sorted(self._ranks.items())],
            step=max((view.step for view in views if view.step is not None), default=None),
            max_steps=pipeline.job.max_steps if pipeline else 0,
            epoch=pipeline.job.epoch if pipeline else None,
            loss=loss if loss is not None or not losses else sum(losses) / len(losses),
            received=pipeline.received if pipeline else 0,
            written=run.written if run else 0,
            thinned=run.thinned if run else 0,
            withheld=run.withheld if run else 0,
            late=pipeline.late if pipeline else 0,
            rejected=pipeline.rejected if pipeline else 0,
            dropped=sum(rank.dropped for rank in self._ranks.values()) + (pipeline.dropped if pipeline else 0),
            lag=pipeline.lag() if pipeline else 0.0,
            run_dir=run.run_dir if run else None,
            url=run.url if run else None,
            notices=list(self._notices),
        )

    @staticmethod
    def _rank_status(number: int, rank: _Rank, now: float) -> RankStatus:
        return RankStatus(
            rank=number,
            host=rank.hello.host,
            pid=rank.hello.pid,
            gpu=rank.hello.gpu,
            state=rank.state,
            step=rank.view.step,
            loss=rank.view.loss,
            step_time=rank.view.step_time,
            silent=now - rank.heard,
            logged=max(rank.logged, rank.view.received),
            received=rank.view.received,
            dropped=rank.dropped,
        )

    # The writer's own clock.

    def _tick_forever(self) -> None:
        next_line = 0.0
        while True:
            time.sleep(TICK_S)
            now = time.monotonic()
            try:
                with self._lock:
                    self._notice_lost_ranks(now)
                    self._maybe_end()
                if now >= next_line:
                    next_line = now + STATUS_LINE_S
                    stderr(status_line(self.status()))
            except Exception:  # without this thread the run would never end
                stderr(traceback.format_exc())
            if self._end is not None:
                self._leave()
                return

    def _notice_lost_ranks(self, now: float) -> None:
        failed = any(rank.state not in ("running", "success") for rank in self._ranks.values())
        timeout = min(self._settings.rank_timeout, FAILED_RANK_GRACE_S) if failed else self._settings.rank_timeout
        for number, rank in self._ranks.items():
            if rank.state != "running":
                continue
            silent = now - rank.heard
            gone = silent > 2 * BEAT_S and self._alive(rank) is False
            # What it sent before may still wait in the pipeline, and say how it ended.
            if (gone or silent > timeout) and self._opened.behind() < silent:
                rank.state = "lost"
                # It was heard every BEAT_S at least, so it fell about then; its peers' errors came of it.
                rank.ended_ns = time.time_ns() - int((silent - BEAT_S / 2) * 1e9)
                rank.error = "its process is gone (killed?)" if gone else f"no sign of life for {timeout:.0f} s"
                outcome = rank.view.outcome
                if outcome is not None and outcome.state is not None:
                    rank.state, rank.error, rank.ended_ns = outcome.state, outcome.error, outcome.time_ns
                stderr(f"rank {number} is gone: {rank.state}{' - ' + rank.error if rank.error else ''}")
                self._members_changed()

    def _alive(self, rank: _Rank) -> bool | None:
        """Whether the rank's process exists, where this process could see it."""
        if rank.hello.pid_namespace != self._pid_namespace:
            return None
        try:
            with open(f"/proc/{rank.hello.pid}/stat") as stat:
                return stat.read().rpartition(")")[2].split()[0] not in ("Z", "X")
        except OSError:
            return False

    def _maybe_end(self) -> None:
        if self._end is not None:
            return
        now = time.monotonic()
        if any(rank.state == "running" for rank in self._ranks.values()):
            return
        absent = self._world_size - len(self._ranks)
        if not self._ranks or absent > 0:
            failed = any(rank.state != "success" for rank in self._ranks.values())
            patience = min(self._settings.rank_timeout, FAILED_RANK_GRACE_S) if failed else self._settings.rank_timeout
            last = max((rank.heard for rank in self._ranks.values()), default=self._born)
            if now - last < patience:
                return
        self._end = self._verdict()
        if self._pipeline is not None:
            self._pipeline.finish(*self._end)

    def _verdict(self) -> tuple[State, str | None]:
        """Success only if every rank finished; else the first failure is the cause."""
        bad = sorted((r for r in self._ranks.values() if r.state != "success"), key=lambda r: r.ended_ns)
        if bad:
            first = bad[0]
            where = f"rank {first.hello.rank} ({first.hello.host}, pid {first.hello.pid})"
            if first.state == "lost":
                also = ", ".join(str(r.hello.rank) for r in bad[1:] if r.state == "lost")
                return "crashed", f"{where} was lost: {first.error}" + (f"; then lost: rank {also}" if also else "")
            state: State = "aborted" if first.state == "aborted" else "crashed"
            return state, f"{where}: {first.error or first.state}"
        absent = sorted(set(range(self._world_size)) - set(self._ranks))
        if absent or not self._ranks:
            names = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
            return "crashed", f"of {self._world_size} ranks, {len(absent)} never reported (rank {names})"
        return "success", None

    def _leave(self) -> None:
        """Close SwanLab's run, let watchers read the end, and end this actor for good."""
        if self._pipeline is not None:
            self._pipeline.run.closed.wait(CLOSE_DEADLINE_S)
            stderr(status_line(self.status()))
            time.sleep(LINGER_S)
        if ray.is_initialized():
            # Unlike ray.kill this runs atexit and does not restart the actor.
            ray.get_runtime_context().current_actor.__ray_terminate__.remote()

    # Small helpers, called with the lock held.

    @property
    def _opened(self) -> Pipeline:
        assert self._pipeline is not None, "a rank says hello first"
        return self._pipeline

    def _members_changed(self) -> None:
        running = {number for number, rank in self._ranks.items() if rank.state == "running"}
        self._opened.set_ranks(running, missing=max(0, self._world_size - len(self._ranks)))

    def _flush_interval(self) -> float:
        return max(FLUSH_INTERVAL_S, self._world_size / CALLS_PER_SECOND)

    def _notice(self, sentence: str) -> None:
        self._notices.append(sentence)
        stderr(sentence)

    def _take_notices(self, rank: _Rank) -> list[str]:
        notices, rank.view.notices = rank.view.notices, []
        if rank.hello.rank == 0:
            # What concerns the whole run is told once, on rank 0.
            of_run = self._notices[self._told :]
            self._told += len(of_run)
            notices = notices + of_run
        return notices


def get_or_create(run_id: str, settings: ObserverSettings, life_lock: str | None = None) -> Any:
    """The handle of this run's writer; whichever rank comes first creates it."""
    actor_class = ray.remote(concurrency_groups={"io": 1, "query": 2})(Writer)
    options: dict[str, Any] = {}
    if "node:__internal_head__" in ray.cluster_resources():
        # On the head it dies only with the cluster itself; affinity to a node goes astray with num_cpus=0.
        options["resources"] = {"node:__internal_head__": 0.001}
    return actor_class.options(
        name=f"{ACTOR_PREFIX}{run_id}",
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
        **options,
    ).remote(run_id, settings, life_lock)
