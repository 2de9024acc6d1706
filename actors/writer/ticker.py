"""The writer's own thread: whatever fails in it, the run ends one day, and the actor with it."""

from __future__ import annotations

import threading
import time
import traceback
from contextlib import suppress

import ray

from swanlab_ray.actors.journal.records import Tick
from swanlab_ray.actors.log import log
from swanlab_ray.actors.membership.lost import notice_lost
from swanlab_ray.actors.notify.messages import MOVES_AGAIN
from swanlab_ray.actors.wire.messages import BEAT_S
from swanlab_ray.actors.wire.status import duration, standstill, status_line
from swanlab_ray.actors.writer.ending import JOURNAL_DEADLINE_S, Ending
from swanlab_ray.actors.writer.parts import Parts
from swanlab_ray.actors.writer.report import Report
from swanlab_ray.actors.writer.telling import Telling

TICK_S = 0.2
ALIVE_TICK_S = 60.0
"""Seconds between two signs of life in a journal in which nothing else is written, for readers on other machines."""
QUIET_TICK_S = 1.0
"""Seconds between two ticks in the journal while values wait for silent ranks."""
STATUS_LINE_S = 5.0
LINGER_S = 3.0
"""How long the actor stays after the end, so that whoever watches reads the final counts."""


class Ticker:
    """Looks after the run while nobody calls.

    Args:
        parts: of the writer.
        ending: says when the run is over, and closes it.
        report: says what is known.
        telling: tells a chat.
    """

    def __init__(self, parts: Parts, ending: Ending, report: Report, telling: Telling) -> None:
        self._parts = parts
        self._ending = ending
        self._report = report
        self._telling = telling
        self._next_line = 0.0
        self._ticked = self._last_tick = time.monotonic()

    def start(self) -> None:
        """Begin."""
        threading.Thread(target=self._work, name="writer-ticker", daemon=True).start()

    def _work(self) -> None:
        while True:
            time.sleep(TICK_S)
            try:
                if self._tick(time.monotonic()):
                    break
            except Exception:
                log(traceback.format_exc())
        try:
            self._leave()
        except Exception:
            log(traceback.format_exc())
        self._report.closed = True
        self._die()

    def _tick(self, now: float) -> bool:
        """Whether this writer is done."""
        fenced = self._parts.journal.fenced
        with self._parts.members.lock:
            if now - self._ticked > 2 * BEAT_S:  # this process was paused, and could hear nobody
                self._parts.health.paused(now - self._ticked, now)
                self._parts.members.paused(now - self._ticked)
            self._ticked = now
            if not fenced:
                notice_lost(
                    self._parts.members,
                    self._parts.settings.rank_timeout,
                    self._parts.clock,
                    now,
                    self._parts.decoding.behind(),
                )
                self._notice_hang(now)
                self._parts.members.notice_odd_world(now)
                self._ending.look(now)
                self._keep_time(now)
            done = self._ending.outcome is not None or (fenced and self._deserted(now))
        if now >= self._next_line and not done:
            self._next_line = now + STATUS_LINE_S
            log(status_line(self._report.status()))
            if not fenced:
                self._telling.look()
        return done

    def _deserted(self, now: float) -> bool:
        """Whether no rank asks a writer any more that has been replaced."""
        return now - self._parts.members.heard > self._parts.settings.rank_timeout

    def _keep_time(self, now: float) -> None:
        """Put time into the journal while nothing else does, for values that wait for silent ranks."""
        quiet = now - max(self._parts.members.last_batch, self._last_tick)
        if quiet > (QUIET_TICK_S if self._parts.reducer.waiting else ALIVE_TICK_S):
            self._last_tick = now
            self._parts.journal.append(Tick())
        self._parts.notes.note(now_and_then=True)

    def _notice_hang(self, now: float) -> None:
        told = self._parts.health.hang
        over = self._parts.health.look(self._parts.members.ranks.values(), now, self._parts.clock.now())
        hang = self._parts.health.hang
        if hang is not None and hang is not told:
            self._parts.notices(standstill(hang))
        if over is not None:
            self._parts.notices(
                f"{MOVES_AGAIN} at {time.strftime('%H:%M:%S')}, after {duration(over.seconds)} without one."
            )

    def _leave(self) -> None:
        """Close SwanLab's run and the journal."""
        if self._parts.reducer.opened and not self._parts.journal.fenced:
            self._ending.wait_closed()
            self._telling.end()
            self._ending.note_closed()
        self._parts.journal.close(JOURNAL_DEADLINE_S / 2)

    def _die(self) -> None:
        """Let watchers read the end, and end this actor for good."""
        with suppress(Exception):
            log(status_line(self._report.status()))
        time.sleep(LINGER_S)
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
            # Unlike ray.kill this runs atexit and does not restart the actor.
            ray.get_runtime_context().current_actor.__ray_terminate__.remote()
