"""The writer: one named Ray actor per run, the only process that writes SwanLab.

Ranks reach it through :func:`get_or_create`. What arrives stays in order (one thread, group ``io``); signs of life and
questions are answered beside it (group ``query``), so a full batch never delays them.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import ray

from swanlab_ray.actors.aggregate import Aggregator
from swanlab_ray.actors.locks import hold_lock, pid_namespace
from swanlab_ray.actors.protocol import (
    ACTOR_PREFIX,
    NAMESPACE,
    RANK,
    SCALARS,
    Ack,
    Beat,
    Config,
    Goodbye,
    Hello,
    Outcome,
    Progress,
    RankStatus,
    Scalars,
    State,
    Welcome,
    WriterStatus,
    decode_batch,
)
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.status import status_line
from swanlab_ray.actors.swanlab_run import SwanLabRun, stderr

TICK_S = 0.2
STATUS_LINE_S = 5.0
FLUSH_INTERVAL_S = 0.2
"""Seconds between two batches of a rank while the world is small."""
CALLS_PER_SECOND = 1000.0
"""Batches a second the writer asks for at most: it saturates at about 2,800 (two cores, Ray 2.60)."""
FAILED_RANK_GRACE_S = 15.0
"""Once one rank has failed, silence this long means that its peers went with it."""
LINGER_S = 3.0
"""How long the actor stays after the end, so that whoever watches reads the final counts."""


class RunEnded(Exception):
    """The run is closing. Whoever still wants to write needs a new writer."""


@dataclass(slots=True)
class _Rank:
    hello: Hello
    heard: float  # monotonic
    next_seq: int
    state: str = "running"
    error: str | None = None
    ended_ns: int = 0
    outcome: Outcome | None = None
    step: int | None = None
    loss: float | None = None
    step_time: float | None = None
    logged: int = 0
    received: int = 0
    dropped: int = 0
    lost_batches: int = 0
    notices: list[str] = field(default_factory=list)


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
        self._run: SwanLabRun | None = None
        self._aggregator = Aggregator(self._write, settings.rank_series)
        self._job = Progress(0, 0)
        self._job_loss: float | None = None
        self._received = 0
        self._rejected = 0
        self._rejected_keys: set[str] = set()
        self._notices: list[str] = []
        self._told = 0  # of the run's notices, how many rank 0 has seen
        self._end: tuple[State, str | None] | None = None
        self._born = time.monotonic()
        self._pid_namespace = pid_namespace()
        self._ticker = threading.Thread(target=self._tick_forever, name="writer-ticker", daemon=True)
        self._ticker.start()

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
            if self._run is None:
                self._run = SwanLabRun(self._settings, self._run_id)
                self._world_size = hello.world_size
            known = self._ranks.get(hello.rank)
            if known is None or known.hello.life != hello.life:
                known = self._arrive(hello, known)
            elif known.state == "lost":
                known.state = "running"
            known.heard = time.monotonic()
            if hello.next_seq > known.next_seq:
                # An earlier incarnation of this writer acknowledged these and took them with it.
                known.lost_batches += hello.next_seq - known.next_seq
                self._notice(
                    f"{hello.next_seq - known.next_seq} batches of rank {hello.rank} were lost with an earlier writer."
                )
                known.next_seq = hello.next_seq
            self._tell_aggregator()
            return Welcome(
                next_seq=known.next_seq,
                flush_interval=self._flush_interval(),
                notices=self._take_notices(known),
            )

    def _arrive(self, hello: Hello, earlier: _Rank | None) -> _Rank:
        rank = _Rank(hello, time.monotonic(), hello.next_seq)
        if earlier is not None:
            rank.received, rank.dropped = earlier.received, earlier.dropped
            self._aggregator.restart_rank(hello.rank)
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
                rank.notices.append(sentence)
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
            now = sender.heard = time.monotonic()
            if sender.state == "lost":
                sender.state = "running"
                self._tell_aggregator()
            if seq == sender.next_seq:
                sender.next_seq += 1
                self._take(sender, batch, now)
            return Ack(sender.next_seq, self._flush_interval(), self._take_notices(sender))

    def _take(self, sender: _Rank, batch: bytes, now: float) -> None:
        rank = sender.hello.rank
        events, rejected = decode_batch(batch)
        for bad in rejected:
            if bad.key not in self._rejected_keys and len(self._rejected_keys) < 1000:
                self._rejected_keys.add(bad.key)
                sender.notices.append(f"'{bad.key}' is not logged: {bad.reason}; log numbers.")
        self._rejected += len(rejected)
        sender.received += len(events)
        self._received += len(events)
        for event in events:
            match event:
                case Scalars():
                    self._aggregator.add(rank, event, now)
                    self._look_at(sender, event)
                case Progress():
                    sender.step = event.step
                    if event.step >= self._job.step or event.max_steps != self._job.max_steps:
                        self._job = event
                case Outcome():
                    sender.outcome = event
                case Config():
                    assert self._run is not None
                    self._run.config(event.values)

    def _look_at(self, sender: _Rank, scalars: Scalars) -> None:
        """Keep the latest step, loss and step time of a rank for the status."""
        if sender.step is None or scalars.step > sender.step:
            sender.step = scalars.step
        values = scalars.values
        loss = values.get("loss", values.get("train/loss"))
        if loss is not None:
            if scalars.scope == RANK or sender.loss is None:
                sender.loss = loss
            if scalars.scope != RANK and sender.hello.rank == 0:
                self._job_loss = loss
        if "step_time" in values:
            sender.step_time = values["step_time"]

    @ray.method(concurrency_group="io")
    def goodbye(self, goodbye: Goodbye) -> bool:
        """A rank ends. Returns whether it was the last one, which then may wait for the run to be closed."""
        with self._lock:
            rank = self._ranks.get(goodbye.rank)
            if rank is not None and rank.hello.life == goodbye.life:
                rank.state, rank.error, rank.ended_ns = goodbye.state, goodbye.error, goodbye.time_ns
                rank.logged, rank.dropped = goodbye.logged, goodbye.dropped
                rank.heard = time.monotonic()
                self._tell_aggregator()
                stderr(f"rank {goodbye.rank} ended: {goodbye.state}{' - ' + goodbye.error if goodbye.error else ''}")
            self._maybe_end()
            return self._end is not None

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
                self._tell_aggregator()
            return self._end is None

    @ray.method(concurrency_group="query")
    def status(self) -> WriterStatus:
        """What the writer knows now."""
        with self._lock:
            return self._status()

    def _status(self) -> WriterStatus:
        run, now = self._run, time.monotonic()
        state, error = self._end or ("running", None)
        return WriterStatus(
            run_id=self._run_id,
            project=self._settings.project or "",
            experiment=self._settings.experiment_name,
            mode=run.mode if run else self._settings.mode,
            state=state,
            error=error,
            closed=run is not None and run.closed.is_set(),
            world_size=self._world_size,
            ranks=[
                RankStatus(
                    rank=number,
                    host=rank.hello.host,
                    pid=rank.hello.pid,
                    gpu=rank.hello.gpu,
                    state=rank.state,
                    step=rank.step,
                    loss=rank.loss,
                    step_time=rank.step_time,
                    silent=now - rank.heard,
                    logged=max(rank.logged, rank.received),
                    received=rank.received,
                    dropped=rank.dropped,
                )
                for number, rank in sorted(self._ranks.items())
            ],
            step=max((rank.step for rank in self._ranks.values() if rank.step is not None), default=None),
            max_steps=self._job.max_steps,
            epoch=self._job.epoch,
            loss=self._job_loss if self._job_loss is not None else self._mean_loss(),
            received=self._received,
            written=run.written if run else 0,
            thinned=run.thinned if run else 0,
            withheld=run.withheld if run else 0,
            late=self._aggregator.late,
            rejected=self._rejected,
            dropped=sum(rank.dropped for rank in self._ranks.values()),
            lag=run.lag() if run else 0.0,
            run_dir=run.run_dir if run else None,
            url=run.url if run else None,
            notices=self._notices + (run.notices if run else []),
        )

    def _mean_loss(self) -> float | None:
        losses = [rank.loss for rank in self._ranks.values() if rank.loss is not None]
        return sum(losses) / len(losses) if losses else None

    # The writer's own clock.

    def _tick_forever(self) -> None:
        next_line = 0.0
        while True:
            time.sleep(TICK_S)
            now = time.monotonic()
            with self._lock:
                self._notice_lost_ranks(now)
                self._aggregator.tick(now)
                self._maybe_end()
                line = status_line(self._status()) if now >= next_line else None
                ended = self._end is not None
            if line:
                stderr(line)
                next_line = now + STATUS_LINE_S
            if ended:
                self._leave()
                return

    def _notice_lost_ranks(self, now: float) -> None:
        failed = any(rank.state not in ("running", "success") for rank in self._ranks.values())
        timeout = min(self._settings.rank_timeout, FAILED_RANK_GRACE_S) if failed else self._settings.rank_timeout
        for number, rank in self._ranks.items():
            if rank.state != "running":
                continue
            gone = self._alive(rank) is False and now - rank.heard > 2.0
            if gone or now - rank.heard > timeout:
                rank.state = "lost"
                rank.ended_ns = time.time_ns()
                rank.error = "its process is gone (killed?)" if gone else f"no sign of life for {timeout:.0f} s"
                if rank.outcome is not None and rank.outcome.state is not None:
                    rank.state, rank.error = rank.outcome.state, rank.outcome.error
                    rank.ended_ns = rank.outcome.time_ns
                stderr(f"rank {number} is gone: {rank.state}{' - ' + rank.error if rank.error else ''}")
                self._tell_aggregator()

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
        self._aggregator.flush()
        if self._run is not None:
            self._run.finish(*self._end)

    def _verdict(self) -> tuple[State, str | None]:
        """Success only if every rank finished; else the first failure is the cause."""
        bad = sorted((r for r in self._ranks.values() if r.state != "success"), key=lambda r: r.ended_ns)
        if bad:
            first = bad[0]
            where = f"rank {first.hello.rank} ({first.hello.host}, pid {first.hello.pid})"
            if first.state == "lost":
                return "crashed", f"{where} was lost: {first.error}"
            state: State = "aborted" if first.state == "aborted" else "crashed"
            return state, f"{where}: {first.error or first.state}"
        absent = sorted(set(range(self._world_size)) - set(self._ranks))
        if absent or not self._ranks:
            names = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
            return "crashed", f"of {self._world_size} ranks, {len(absent)} never reported (rank {names})"
        return "success", None

    def _leave(self) -> None:
        """Close SwanLab's run, let watchers read the end, and end this actor for good."""
        if self._run is not None:
            self._run.closed.wait()
            stderr(status_line(self.status()))
            time.sleep(LINGER_S)
        if ray.is_initialized():
            # Unlike ray.kill this runs atexit and does not restart the actor.
            ray.get_runtime_context().current_actor.__ray_terminate__.remote()

    # Small helpers, called with the lock held.

    def _write(self, step: int, time_ns: int, values: dict[str, float]) -> None:
        assert self._run is not None
        self._run.write(step, time_ns, values)

    def _tell_aggregator(self) -> None:
        running = {number for number, rank in self._ranks.items() if rank.state == "running"}
        self._aggregator.set_ranks(running, missing=max(0, self._world_size - len(self._ranks)))

    def _flush_interval(self) -> float:
        return max(FLUSH_INTERVAL_S, self._world_size / CALLS_PER_SECOND)

    def _notice(self, sentence: str) -> None:
        self._notices.append(sentence)
        stderr(sentence)

    def _take_notices(self, rank: _Rank) -> list[str]:
        notices, rank.notices = rank.notices, []
        if rank.hello.rank == 0 and self._run is not None:
            # What concerns the whole run is told once, on rank 0.
            notices = notices + self._run.notices[self._told :]
            self._told = len(self._run.notices)
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
