"""The one thread of a rank that sends: it empties the queue, sends batches, hears the answers, and connects again."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from swanlab_ray.actors.wire.messages import Ack
from swanlab_ray.observer.job.doing import Pulse
from swanlab_ray.observer.script.notices import logger, warn_once
from swanlab_ray.observer.transport.batches import Batches
from swanlab_ray.observer.transport.connection import Connection
from swanlab_ray.observer.transport.last_words import LastWords, Ownership, Rescued, show
from swanlab_ray.observer.transport.link import Hopeless, LinkBroken, NotNow, RunOver
from swanlab_ray.observer.transport.window import Window

FLUSH_INTERVAL_S = 0.2
"""Pause between two turns; the writer asks for longer ones where the world is large."""
RETRY_S = (0.2, 5.0)
"""First and longest pause between two attempts to connect."""
POLL_S = 0.002
"""Pause before the first look for an acknowledgement that somebody waits for; it doubles."""
ANSWER_S = 0.1
"""How long one look for an answer takes that somebody waits for."""
FRAMES_TOLD = 6
"""Innermost functions that are named where it stands still."""


class Flusher:
    """Owns what a rank holds, see :class:`Ownership`, until it is sent or put aside.

    Args:
        on_welcome: called on the flusher's thread after the first connection.
    """

    def __init__(
        self,
        connection: Connection,
        batches: Batches,
        window: Window,
        last_words: LastWords,
        ownership: Ownership,
        pulse: Pulse,
        on_welcome: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._batches = batches
        self._window = window
        self._last_words = last_words
        self._ownership = ownership
        self._pulse = pulse
        self._on_welcome = on_welcome
        self._interval = FLUSH_INTERVAL_S
        self._retry = RETRY_S[0]
        self._poll = POLL_S
        self._stacks_told = 0
        self._counting = threading.RLock()
        self._hurried = 0  # how many wait until everything is acknowledged
        self.last_error: str | None = None
        self.wake = threading.Event()
        """There is something to do."""
        self.ready = threading.Event()
        """The writer has welcomed this rank."""
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, name="swanlab-ray-flusher", daemon=True)

    @contextmanager
    def hurried(self) -> Iterator[None]:
        """Meanwhile somebody waits until everything is acknowledged."""
        with self._counting:
            self._hurried += 1
        try:
            yield
        finally:
            with self._counting:
                self._hurried -= 1

    def ended_within(self, seconds: float) -> bool:
        """Wait for its end."""
        return self.done.is_set() or (self.thread.is_alive() and self.done.wait(seconds))

    def note_where_it_stands(self) -> None:
        """As the last error, if it does."""
        frame = sys._current_frames().get(self.thread.ident or 0)
        if frame is not None:
            calls = traceback.extract_stack(frame)[-FRAMES_TOLD:]
            self.last_error = f"the thread that sends stands still: {' < '.join(call.name for call in calls[::-1])}"

    def _run(self) -> None:
        try:
            with self._ownership.of_flusher():
                self._work()
                self._put_aside()
        finally:
            try:
                self._connection.leave()
            except Exception as error:
                self.last_error = str(error)
            self.done.set()

    def _work(self) -> None:
        try:
            while not self._look():
                pass
        except Rescued:
            raise
        except BaseException:
            logger.warning("The observer of this rank stopped; the training goes on.\n%s", traceback.format_exc())

    def _look(self) -> bool:
        """Whether there is no more to do, or no more time."""
        try:
            if not self._connection.up and not self._connect():
                if not self._last_words.out_of_time:
                    return False
                self.last_error = self.last_error or "the connection was still being opened"
                return True
            if self._turn():
                return True
            if not self._last_words.due and not self._batches.more:
                self._pause(self._interval)
            return False
        except Exception as error:  # a broken link, or anything unforeseen: this thread must not end
            return self._failed(error)

    def _pause(self, seconds: float) -> None:
        """Wait, unless there is something to do."""
        with self._ownership.away():
            self.wake.wait(seconds)
        self.wake.clear()

    def _sleep(self, seconds: float) -> None:
        with self._ownership.away():
            time.sleep(seconds)

    # Connecting.

    def _connect(self) -> bool:
        welcome = self._connection.open(self._window.first)
        if welcome is None:
            self._collect()
            return False
        self._heed(welcome)
        self._window.welcomed(welcome)
        self._retry = RETRY_S[0]
        if self._connection.times == 1:
            try:
                self._on_welcome()
            finally:
                self.ready.set()
        return True

    def _failed(self, error: Exception) -> bool:
        """Whether it is not tried again."""
        last_words, run_over = self._last_words, isinstance(error, RunOver)
        if run_over and last_words.all_said:
            return True
        self._connection.up = False
        self._window.broken()
        self.last_error = str(error) if isinstance(error, LinkBroken) else traceback.format_exc()
        self._tell(error)
        if last_words.due and isinstance(error, Hopeless):
            return True
        if last_words.out_of_time or time.monotonic() >= last_words.tries_until:
            return True
        self._collect()
        if last_words.due:
            self._sleep(RETRY_S[0])
        else:
            self._pause(RETRY_S[0] if run_over else self._retry)
        self._retry = min(2 * self._retry, RETRY_S[1])
        return False

    def _tell(self, error: Exception) -> None:
        if isinstance(error, RunOver):
            return
        if isinstance(error, NotNow):
            show([str(error)] if str(error) else [])
        elif isinstance(error, Hopeless):
            warn_once("unreachable", f"{error} The training goes on.")
        elif not self._connection.times:
            why = str(self.last_error).rstrip(". ")
            warn_once("unreachable", f"{why} - the training goes on; still trying.")
        else:
            warn_once("away", f"The writer is away ({self.last_error}); events are kept until it is back.")

    # Sending.

    def _turn(self) -> bool:
        """Take events, send them, hear what was acknowledged. True when everything is said."""
        ending = self._last_words.due
        self._collect()
        self._pulse.look()
        self._window.send()
        # With more to send than the window takes, what there is to wait for is an answer.
        pressing = ending or self._batches.more or self._hurried > 0
        for answer in self._window.answers(ANSWER_S if pressing else 0.0):
            self._heed(answer)
        self._window.send()
        self._window.give_sign(now=pressing and self._window.all_taken)
        if ending and not self._window.under_way and self._batches.empty:
            self._last_words.say()
            return True
        if pressing and not self._window.asking:
            self._sleep(self._poll)  # for the disk, for room, or for a GPU
            self._poll = min(2 * self._poll, FLUSH_INTERVAL_S)
        if not ending or not self._last_words.out_of_time:
            return False
        self._put_aside()
        self._last_words.say()
        return True

    def _put_aside(self) -> None:
        self._last_words.put_aside(self.last_error or "no time left")

    def _collect(self) -> None:
        self._batches.collect(self._window.under_way)

    def _heed(self, answer: Ack) -> None:
        self._interval = answer.flush_interval
        show(answer.notices)
        if self._window.heed(answer):
            self._poll = POLL_S
        if answer.stacks > self._stacks_told:
            self._stacks_told = answer.stacks
            self._batches.report(self._pulse.stacks())
