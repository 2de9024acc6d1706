"""What a rank reports through: :class:`Observer`, which ``connect()`` returns."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - Ray needs it, and it cannot be imported once the interpreter is ending
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from time import monotonic, time_ns
from types import TracebackType
from typing import Any, SupportsIndex, get_args

from swanlab_ray.actors.runs.causes import TERMINATED
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.events import COMPLETIONS, CONFIG, JOB, OUTCOME, PROGRESS, RANK, SCALARS, USER, State
from swanlab_ray.actors.wire.locks import pid_namespace
from swanlab_ray.actors.wire.messages import Goodbye, Hello
from swanlab_ray.actors.wire.secret_shapes import hide
from swanlab_ray.actors.wire.status import WriterStatus, ending
from swanlab_ray.actors.wire.version import package_version
from swanlab_ray.observer.encoding.arguments import MOST, checked_step, readable, rows_of
from swanlab_ray.observer.encoding.cells import columns_of
from swanlab_ray.observer.encoding.numbers import Deferred, HostCopy, encode, salvage
from swanlab_ray.observer.encoding.redact import configuration
from swanlab_ray.observer.job.doing import Pulse
from swanlab_ray.observer.job.identity import (
    Identity,
    Launch,
    gpu_name,
    most_restarts,
    warn_of_a_later_group,
    which_launch,
)
from swanlab_ray.observer.job.node_metrics import NodeMetrics
from swanlab_ray.observer.script.ending import ExitWatch, describe
from swanlab_ray.observer.script.never_raises import Wrong, never_raises, records, shown
from swanlab_ray.observer.script.notices import logger, warn_once
from swanlab_ray.observer.script.sigterm import TerminationWatch
from swanlab_ray.observer.timing.spans import NoSpan, Span, SpanLog
from swanlab_ray.observer.transport.channel import Channel, NoChannel
from swanlab_ray.observer.transport.link import Link
from swanlab_ray.observer.transport.queue import SLOT_BYTES
from swanlab_ray.observer.transport.spool import Spool
from swanlab_ray.observer.transport.tally import ChannelStatistics

FINISH_TIMEOUT_S = 90.0
"""How long ``finish()`` takes at most: SwanLab gets 60 s to close, the rest is for sending."""
SIGTERM_S = 4.0
"""The same after SIGTERM; launchers wait 30 s before they send SIGKILL."""
MOST_NAMED = 500
"""Wrong values and calls that are named in a warning; what else goes wrong is still told after them."""
STRICT_CONNECT_S = 120.0
"""How long ``connect()`` waits for the writer under ``strict=True``: a cluster may have to be started."""
STRICT_RETRY_S = 5.0
"""The same once there was an error."""


class Observer:
    """Reports one rank to the run's writer. Made by :func:`connect`.

    No method blocks on the network or raises into training, except :meth:`finish`, which waits with a deadline, and
    everything under ``strict=True``, which raises on wrong values.
    """

    _on_finish: Callable[[Observer], None] = staticmethod(lambda observer: None)
    """Told that it has finished: it is not the current one any more."""

    def __init__(self, settings: ObserverSettings, identity: Identity, link: Link) -> None:
        for secret in (settings.api_key, settings.lark_secret, settings.lark_webhook_url):
            if secret is not None:
                hide(secret.get_secret_value())
        self._describe(settings, identity)
        self._life = secrets.token_hex(8)
        self._launch: Launch | None = None  # known once this rank says hello
        self._pid_namespace = pid_namespace()
        self._watch = ExitWatch(self._at_exit)
        self._termination = TerminationWatch(self._at_sigterm)
        channel = Channel(
            link,
            self.rank,
            self._life,
            self._hello,
            self._announce,
            lambda run_id: Spool(settings, run_id, identity.rank, self._life),
            Pulse(self.spans, self._known_step),
        )
        self._report_through(channel)
        channel.start()
        self.span = partial(Span, self.spans)  # type: ignore[method-assign]  # the method, without its frame
        self._node: NodeMetrics | None = None
        if identity.local_rank == 0 and settings.node_interval > 0:
            self._node = NodeMetrics(
                self.send, self._known_step, identity.node, settings.node_interval, settings.log_dir
            )

    def _describe(self, settings: ObserverSettings, identity: Identity) -> None:
        self.settings = settings
        self.rank = identity.rank
        self.world_size = identity.world_size
        self.local_rank = identity.local_rank
        self.in_ray_train = identity.in_ray_train
        """Whether this is a worker of Ray Train, which is ended without running exit handlers."""
        self.outcome: WriterStatus | None = None
        """How the run ended, once :meth:`finish` of its last rank has returned."""
        self.result: tuple[State | None, str | None] = (None, None)
        """State and error that the exit of this process will report, unless it brings a worse one."""
        self.trained_steps = 0
        """Steps of the trainings of this process, after which a further one goes on; kept by the callbacks."""
        self.tokenizers: set[str] = set()
        """Names of the tokenizers that the writer was sent."""
        # Straight to the channel: what was measured before finish() is still sent while that is under way.
        self.spans = SpanLog(lambda event: self._channel.put(event), lambda: self._last_step + 1, settings.cuda_spans)
        """Takes what :meth:`span` measures; for callbacks."""
        self._last_step = -1
        self._finished = False

    def _report_through(self, channel: Channel) -> None:
        self._channel = channel
        self.unobserved = isinstance(channel, NoChannel)
        self._put: Callable[[bytes | Deferred], object] = channel.put
        self._queue = channel.queue
        self._append: Callable[[bytes | Deferred], object] = channel.queue.append

    def _known_step(self) -> int | None:
        """The step under way or the last one logged; None as long as this life has not told where it stands."""
        if self.spans.step is not None:
            return self.spans.step
        return self._last_step if self._last_step >= 0 else None

    @property
    def step(self) -> int | None:
        """The step under way, to which spans belong. Callbacks keep it, and a loop of your own may set it; while it is
        None, spans belong to the step after the last one logged."""
        return self.spans.step

    @step.setter
    @never_raises(None)
    def step(self, step: int | None) -> None:
        self.spans.step = None if step is None else checked_step(step)

    @property
    def finished(self) -> bool:
        """Whether :meth:`finish` was called."""
        return self._finished

    @property
    def run_id(self) -> str | None:
        """The run id; None until the ranks have agreed on it (see :meth:`wait_ready`)."""
        return self._channel.run_id

    def log(self, data: Mapping[str, Any], step: SupportsIndex | None = None) -> None:
        """Log numbers at a step.

        Args:
            data: names to Python or numpy numbers or 0-d tensors; nested mappings are joined with ``/``.
            step: 0 or more; by default one more than the last one logged here.
        """
        # The hot path: one typed check, one encoding in C, one append.
        if type(step) is int and 0 <= step < 1 << 63 and type(data) is dict:
            try:
                event = encode((SCALARS, step, time_ns(), USER, data))
            except Exception:  # something in it is no number, or lies on a GPU
                self._log(data, step, USER)
                return
            self._last_step = step
            if len(self._queue) < self._queue.room and len(event) < SLOT_BYTES:
                self._append(event)
            else:
                self._put(event)
        else:
            self._log(data, step, USER)

    def log_job(self, data: Mapping[str, Any], step: SupportsIndex | None = None) -> None:
        """Log numbers that are already reduced over ranks; call it on one rank."""
        self._log(data, step, JOB)

    def log_rank(self, data: Mapping[str, Any], step: SupportsIndex | None = None) -> None:
        """Log this rank's own measurements, shown over ranks only: ``ranks/<name>/...`` and ``rank/<rank>/<name>``."""
        self._log(data, step, RANK)

    @records
    def _log(self, data: Any, step: Any, scope: int) -> None:
        """The slow path: what cannot be logged is named, the rest is kept; values on a GPU are read by the flusher."""
        number = self._step_of(step)
        if not isinstance(data, Mapping):
            raise Wrong(f"log {type(data)}", f"log() takes a dict of names and numbers, not {type(data).__name__}.")
        now = time_ns()
        event: bytes | Deferred | None
        try:
            event = encode((SCALARS, number, now, scope, data if type(data) is dict else dict(data)))
        except Exception:
            event = self._salvaged(data, number, now, scope)
        self._last_step = number
        if event is not None:
            self._put(event)

    def _salvaged(self, data: Mapping[Any, Any], step: int, now: int, scope: int) -> bytes | Deferred | None:
        kept = salvage(data, self._reject)
        copies = [value for value in kept.values() if isinstance(value, HostCopy)]
        if copies:
            return Deferred(copies, lambda: encode((SCALARS, step, now, scope, kept)))
        return encode((SCALARS, step, now, scope, kept)) if kept else None

    def _step_of(self, step: Any) -> int:
        return min(self._last_step + 1, MOST) if step is None else checked_step(step)

    def _reject(self, name: str, why: str) -> None:
        """A value is not logged."""
        sentence = f"{shown(repr(name))} is not logged: {why}."
        if self.settings.strict:
            raise Wrong(name, sentence)
        self.excuse(f"value {name}", sentence)

    def excuse(self, key: str, sentence: str) -> None:
        """Count something that is wrong and is not logged, and say so once under this key."""
        if self.unobserved:
            return
        self._channel.refuse()
        warn_once(f"wrong {key}", sentence, MOST_NAMED)

    @records
    def log_completions(self, rows: Iterable[Mapping[str, Any]], step: SupportsIndex | None = None) -> None:
        """Log what the model was shown and has said, for the table ``rlhf_completions``.

        Args:
            rows: one mapping for each sample, such as ``{"prompt": ..., "completion": ..., "reward": 0.5}``: names to
                text, numbers, truth values, or conversations (lists of messages).
            step: 0 or more; by default that of the last call of :meth:`log`.
        """
        number = max(0, self._last_step) if step is None else checked_step(step)
        columns = columns_of(rows_of(rows, self._reject), self._reject)
        if columns:
            event = (COMPLETIONS, number, time_ns(), "", "", 0, columns)
            copies = [cell for cells in columns.values() for cell in cells if isinstance(cell, HostCopy)]
            self._put(Deferred(copies, lambda: encode(event)) if copies else encode(event))

    def span(self, name: str) -> Span | NoSpan:
        """Measure a block: ``with observer.span("forward"): ...``. Spans nest, and belong to the step under way."""
        return Span(self.spans, name)

    def send(self, event: bytes | Deferred) -> None:
        """Queue an encoded event; for callbacks. Never blocks."""
        self._put(event)

    @records
    def config(self, /, values: Any = None, **more: Any) -> None:
        """Add to the run's configuration. Values may be nested, of every type; secrets are masked.

        Args:
            values: a mapping, or an object with named parts: ``argparse.Namespace``, a dataclass, a pydantic model.
            more: the same, as keywords.
        """
        self._put(encode((CONFIG, {**configuration(values), **configuration(more)})))

    @records
    def progress(self, step: int, max_steps: int = 0, epoch: float | None = None) -> None:
        """Say how far the training is, for the status; ``max_steps`` 0 where it is not known."""
        if not self._finished:
            self._put(encode((PROGRESS, self._step_of(step), max(0, min(max_steps, MOST)), epoch)))

    @records
    def set_result(self, state: State | None, error: str | None = None) -> None:
        """Say how this rank has ended should the process end now; None: it is at work (again)."""
        if state is not None:
            state = self._checked_state(state)
        self.result = (state, readable(error))
        if not self._finished:
            self._put(encode((OUTCOME, *self.result, time_ns())))

    def _checked_state(self, state: State) -> State:
        if state not in get_args(State):
            known = ", ".join(get_args(State))
            sentence = f"state {shown(state)!r} is none of {known}: it is taken for 'crashed'."
            if self.settings.strict:
                raise Wrong("state", sentence)
            self.excuse("state", sentence)
            return "crashed"
        return state

    @never_raises(False)
    def wait_ready(self, timeout: float) -> bool:
        """Wait until the writer has welcomed this rank."""
        return self._channel.ready.wait(min(timeout, threading.TIMEOUT_MAX))

    def require_ready(self) -> None:
        """Wait for the writer's welcome.

        Raises:
            ConnectionError: the writer cannot be reached; the observer is finished then.
        """
        began = monotonic()
        while not self.wait_ready(0.1):
            waited = monotonic() - began
            if waited > STRICT_CONNECT_S or (self._channel.last_error and waited > STRICT_RETRY_S):
                # Before what finish() has to say.
                why = self._channel.last_error or f"it has not answered for {STRICT_CONNECT_S:.0f} s"
                self.finish("aborted", "never connected", timeout=0.1)
                raise ConnectionError(f"The writer cannot be reached: {why}")

    @never_raises(False)
    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until everything logged so far is in the journal, on disk; False after ``timeout`` seconds."""
        return self._channel.flush(timeout)

    def statistics(self) -> ChannelStatistics:
        """Counts of events logged, acknowledged, spooled, waiting and dropped."""
        return self._channel.statistics()

    @never_raises(False)
    def finish(self, state: State = "success", error: str | None = None, timeout: float = FINISH_TIMEOUT_S) -> bool:
        """End this rank's part; the last rank's finish closes the run and waits for it.

        Args:
            state: ``success``, ``crashed`` or ``aborted``.
            error: why, unless it was a success.
            timeout: seconds after which it returns; what is left by then is put on disk.

        Returns:
            Whether everything this rank had logged before is in the writer's journal.
        """
        return self._finish(state, error, timeout, log_on=False)

    @never_raises(False)
    def _finish(self, state: State, error: str | None, timeout: float, log_on: bool) -> bool:
        """``log_on``: what is logged meanwhile is taken as long as there is time."""
        if self.unobserved:
            self._on_finish(self)
            return True
        timeout = min(max(0.0, float(timeout)), threading.TIMEOUT_MAX)
        if self._finished:
            return self._channel.hurry(timeout)  # another thread may be at it
        state = self._checked_state(state)
        warn_of_a_later_group(self.rank, self.world_size)
        self._finished = True
        if not log_on:  # another thread may log for as long as this takes
            self._put = self._append = self._channel.put_late
        if self._node is not None:
            self._node.stop()
        self.spans.close()
        ended, error = time_ns(), readable(error)
        complete = self._channel.finish(
            lambda counts: Goodbye(
                rank=self.rank,
                life=self._life,
                state=state,
                error=error,
                ended_ns=ended,
                counts=counts,
                sent_ns=time_ns(),
            ),
            timeout,
        )
        self._watch.stop()
        self._termination.stop()
        self._put = self._append = self._channel.put_late
        self.outcome = self._channel.outcome
        if self.outcome is not None:
            logger.info(ending(self.outcome))
        self._on_finish(self)
        return complete

    def __enter__(self) -> Observer:
        return self

    @never_raises(None)
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, GeneratorExit):  # whoever went through a generator needs no more of it
            self.finish()
        else:
            self.finish(*describe(error))

    def __repr__(self) -> str:
        return f"Observer(run_id={self.run_id!r}, rank={self.rank}, world_size={self.world_size})"

    def _at_exit(self, verdict: tuple[State, str] | None) -> None:
        state, error = verdict or self.result
        if state is None:
            state, error = "aborted", "the process ended without finish()"
        try:
            self.finish(state, error)
        except Exception as problem:
            logger.warning("finish() failed at exit: %s", problem)
        self._termination.wait()

    def _at_sigterm(self) -> None:
        state, error = self.result
        if state is None:
            state, error = "aborted", f"{TERMINATED}: the process was told to end (torchrun, Slurm, Kubernetes, kill)"
        self._finish(state, error, SIGTERM_S, log_on=True)  # the training goes on until this process is ended

    def _announce(self) -> None:
        warn_of_a_later_group(self.rank, self.world_size)
        if self.rank == 0:
            logger.info("run %s: %d rank%s, one writer", self.run_id, self.world_size, "s" * (self.world_size > 1))
            if self.settings.lark_webhook_url is not None:
                signed = self.settings.lark_secret is not None
                logger.info(
                    "Registered Lark notification callback %s",
                    "with HMAC authentication" if signed else "(no HMAC secret)",
                )
                if not signed:
                    logger.warning(
                        "Lark webhook has no secret configured. For production use, set 'swanlab_lark_secret' "
                        "(SWANLAB_LARK_SECRET) to the secret in the bot's settings."
                    )

    def _hello(self, next_seq: int) -> Hello:
        self._launch = launch = self._launch or which_launch()
        return Hello(
            rank=self.rank,
            world_size=self.world_size,
            local_rank=self.local_rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            pid_namespace=self._pid_namespace,
            gpu=gpu_name(self.local_rank),
            life=self._life,
            next_seq=next_seq,
            restarts=most_restarts(),
            attempt=launch.attempt,
            nonce=launch.nonce,
            version=package_version(),
            sent_ns=time_ns(),
            settings=self.settings.public(),
        )

    def _forked(self) -> None:
        """In a forked child: the flusher does not exist here, and the run is the parent's."""
        self._report_through(NoChannel(self.run_id))
        self.spans.close()
        self._finished = True
        self._watch.stop()
