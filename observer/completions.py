"""Capturing what a model is shown and says in preference and RL training, on every rank.

TRL hands its rows to nobody. So on the steps that are sampled the trainer is watched from outside: for the preference
losses the local variables of the function that gathers the metrics are read when it has returned; for the generating
trainers the record they keep. No forward pass, no collective, no random number is added, and what is read is copied.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import weakref
from collections.abc import Callable, Mapping
from time import perf_counter_ns, time_ns
from types import FrameType
from typing import Any

from swanlab_ray.actors.wire.events import COMPLETIONS, TOKENIZER
from swanlab_ray.observer.encoding.cells import Columns
from swanlab_ray.observer.encoding.numbers import Deferred, encode
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.script.ending import headline
from swanlab_ray.observer.script.notices import logger, warn_once
from swanlab_ray.observer.script.wrapping import Wrapped
from swanlab_ray.observer.session import current
from swanlab_ray.observer.trainers.algorithms import class_name, detect, of_a_framework
from swanlab_ray.observer.trainers.internals import GATHERS, LOSS
from swanlab_ray.observer.trainers.rows import Snapshot, duels, generated, judged, pairs
from swanlab_ray.observer.trainers.trl_internals import GENERATION, MARK, METRICS, WATCHED, Unknown


def attach(trainer: Any, observer: Observer | None = None) -> CompletionCapture | None:
    """Capture the completions of a trainer that has no :class:`~swanlab_ray.observer.ObserverCallback`.

    Args:
        trainer: a trainer of TRL, or one derived from it.
        observer: where the rows go; by default the connected one.

    Returns:
        The capture; None where the trainer is of no supported kind or not as expected, or ``log_completions`` is off.

    Raises:
        RuntimeError: there is no observer.
    """
    observer = observer or current()
    if observer is None:
        raise RuntimeError("Completions have nowhere to go: call connect() before attach(trainer).")
    algorithm = detect(trainer)
    if algorithm is None or not observer.settings.log_completions or not observer.settings.active:
        return None
    earlier: CompletionCapture | None = getattr(trainer, _CAPTURE, None)
    if earlier is not None:
        if earlier.active and earlier.observer is observer:
            return earlier
        earlier.detach()
    try:
        capture = CompletionCapture(trainer, algorithm, observer)
    except Exception as error:
        if observer.settings.strict:
            raise
        warn_once("completions attach", f"Completions are not logged: {headline(error)[:200]}; the training goes on.")
        return None
    if not capture.active:
        return None
    setattr(trainer, _CAPTURE, capture)
    if observer.rank == 0:
        name = class_name(trainer)
        logger.info("SwanLab RLHF completion logging enabled for %s (type: %s)", name, algorithm)
    return capture


_CAPTURE = "_swanlab_ray_capture"
"""Attribute of a trainer that holds its capture."""
WAITING_CAPTURES = 4
"""Captures that may wait for the flusher with their copies. While so many do none is made; its rows are counted."""


class CompletionCapture:
    """Watches one trainer until :meth:`detach`. Made by :func:`attach`."""

    def __init__(self, trainer: Any, algorithm: str, observer: Observer) -> None:
        self.algorithm = algorithm
        self.step_offset = 0
        """Steps of trainings before this one, in the same run."""
        self.captured = 0
        """Batches that were captured."""
        self.nanoseconds = 0
        """Time of the training thread that was spent here."""
        self.observer = observer
        self.active = True
        """Whether it captures: not any more after :meth:`detach`, or where the trainer is not as expected."""
        self._trainer = weakref.ref(trainer)
        self._waiting: weakref.WeakSet[Deferred] = weakref.WeakSet()
        self._interval = observer.settings.completion_log_interval
        # More rows would only push each other out of the table.
        self._rows = max(1, -(-observer.settings.completion_max_buffer // observer.world_size))
        self._last: int | None = None
        self._missed = 0  # rows of steps that were due while the flusher was behind
        self._texts = _Texts(trainer, observer)
        self._watched: Callable[..., Any] | None = None
        self._method = WATCHED.get(algorithm, LOSS)
        wrap = self._around_generation if self._method == GENERATION else self._around_loss
        if not hasattr(trainer, self._method):
            self._fail(Unknown(f"no method {self._method}"))
            return
        self._before = {name: own for name, own in vars(trainer).items() if name == self._method}
        self._watched = wrap(getattr(trainer, self._method))
        setattr(trainer, self._method, self._watched)  # of this one trainer; its class stays as it is

    def detach(self) -> None:
        """Let go of the trainer."""
        trainer, self.active = self._trainer(), False
        if trainer is None:
            return
        vars(trainer).pop(_CAPTURE, None)
        if self._watched is not None and vars(trainer).get(self._method) is self._watched:
            vars(trainer).pop(self._method)
            vars(trainer).update(self._before)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A copy of a trainer is not watched: its capture is None."""
        return _nobody, ()

    def _due(self, trainer: Any) -> bool:
        """Whether this step is sampled: the first one, every Nth, and the last."""
        if not self.active or not trainer.model.training:
            return False
        step = trainer.state.global_step
        due = self._last is None or step < self._last or step - self._last >= self._interval
        due = due or (step + 1 == trainer.state.max_steps and step != self._last)
        if due and len(self._waiting) >= WAITING_CAPTURES:
            self._missed += trainer.args.per_device_train_batch_size
            return False
        return bool(due)

    def _around_loss(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``compute_loss(model, inputs)``, or ``training_step(model, inputs)`` where that does everything."""

        def watched(method: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            trainer = self._trainer()
            # Of the micro-batches of a step, the last one.
            if trainer is None or not self._guarded(lambda: trainer.accelerator.sync_gradients and self._due(trainer)):
                return method(model, inputs, *args, **kwargs)
            tap: _Tap | None = self._guarded(lambda: _Tap(trainer))
            if tap is None:
                return method(model, inputs, *args, **kwargs)
            try:
                result = method(model, inputs, *args, **kwargs)
                self._guarded(lambda: self._take(trainer, self._snapshot(inputs, tap)))
                return result
            finally:
                tap.remove()

        return Wrapped(method, watched)

    def _around_generation(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``_generate_and_score_completions(inputs)``."""

        def watched(method: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(inputs, *args, **kwargs)
            trainer = self._trainer()
            if trainer is not None and self._guarded(lambda: self._due(trainer)):
                self._guarded(lambda: self._take(trainer, generated(trainer, len(inputs), self._rows)))
            return result

        return Wrapped(method, watched)

    def _snapshot(self, inputs: Mapping[str, Any], tap: _Tap) -> Snapshot:
        values = tap.values()
        if not values:
            raise Unknown(f"no variable {MARK}")
        if self.algorithm == "online_dpo":
            return duels(values, self._rows)
        if self.algorithm == "kto":
            return judged(inputs, values, self._rows)
        return pairs(self.algorithm, inputs, values, self._rows)

    def _take(self, trainer: Any, snapshot: Snapshot) -> None:
        self._last = trainer.state.global_step
        step, now = self.step_offset + self._last + 1, time_ns()
        left_out, self._missed = snapshot.total - snapshot.rows + self._missed, 0

        def encoded() -> bytes:
            try:
                columns = self._texts.ready(snapshot.columns())
                return encode((COMPLETIONS, step, now, self.algorithm, self._texts.name, left_out, columns))
            except Exception as error:
                self._fail(error)
                raise

        event = Deferred(snapshot.copies, encoded)
        self._waiting.add(event)
        self.observer.send(event)
        self.captured += 1

    def _guarded(self, action: Callable[[], Any]) -> Any:
        """Do it, on the clock; a failure ends the capture, never the training."""
        began = perf_counter_ns()
        try:
            return action()
        except Exception as error:
            self._fail(error)
            return None
        finally:
            self.nanoseconds += perf_counter_ns() - began

    def _fail(self, error: Exception) -> None:
        if not self.active:
            return
        self.active = False
        trainer = self._trainer()
        versions = [
            f"{name} {sys.modules[name].__version__}" for name in ("trl", "transformers") if name in sys.modules
        ]
        logger.log(
            logging.WARNING if self.observer.rank == 0 else logging.DEBUG,  # one for the job: the ranks are alike
            "Completions are not logged any more: the %s trainer of %s is not as expected (%s)%s. "
            "The training goes on; log_completions(rows, step) can be used instead.",
            self.algorithm,
            " and ".join(versions),
            headline(error)[:200],
            ("" if trainer is None else of_a_framework(trainer)),
        )


def _nobody() -> None: ...


class _Tap:
    """Shows who gathers or keeps metrics, until it is removed: the last function that has the mark."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = vars(trainer)
        self._own = vars(trainer.accelerator)
        self._before = {name: self._own[name] for name in GATHERS if name in self._own}
        self._frame: FrameType | None = None
        self._own.update({name: self._shown(getattr(trainer.accelerator, name)) for name in GATHERS})
        self._metrics: Any = self._trainer.get(METRICS)
        if type(self._metrics) is dict:  # a framework's subclass may gather nothing
            self._trainer[METRICS] = _Shown(self._metrics, self._look)

    def _look(self, frame: FrameType) -> None:
        if frame is not self._frame and MARK in frame.f_code.co_varnames:
            self._frame = frame

    def _shown(self, gather: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            self._look(sys._getframe(1))
            return gather(*args, **kwargs)

        return called

    def values(self) -> Mapping[str, Any]:
        """That function's local variables as they were at its end."""
        return {} if self._frame is None else self._frame.f_locals

    def remove(self) -> None:
        """Let go of trainer, accelerator and variables: the batch's logits must be gone before the backward pass."""
        self._frame = None
        for name in GATHERS:
            self._own.pop(name, None)
        self._own.update(self._before)
        shown = self._trainer.get(METRICS)
        if isinstance(shown, _Shown):
            self._metrics.update(shown)
            self._trainer[METRICS] = self._metrics


class _Shown(dict[Any, Any]):
    """The metrics that a trainer keeps, which show who asks for one."""

    def __init__(self, metrics: dict[Any, Any], look: Callable[[FrameType], None]) -> None:
        super().__init__(metrics)
        self._look = look

    def __getitem__(self, name: Any) -> Any:
        self._look(sys._getframe(1))
        return super().__getitem__(name)


class _Texts:
    """Who makes text of token ids: the writer, which gets the tokenizer once, from rank 0.

    A tokenizer that is not of the ``tokenizers`` library cannot travel; its text is made here, by the flusher.
    """

    def __init__(self, trainer: Any, observer: Observer) -> None:
        self.name = ""
        processing: Any = getattr(trainer, "processing_class", None) or getattr(trainer, "tokenizer", None)
        self._tokenizer: Any = getattr(processing, "tokenizer", processing)
        backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        definition = _definition(backend) if hasattr(backend, "to_str") else None
        if definition is not None:
            self.name = hashlib.blake2b(definition, digest_size=8).hexdigest()
            if observer.rank == 0 and self.name not in observer.tokenizers:
                observer.tokenizers.add(self.name)
                observer.send(encode((TOKENIZER, self.name, definition)))

    def ready(self, columns: Columns) -> Columns:
        """Columns that the writer can read."""
        if self.name or self._tokenizer is None:
            return columns
        return {name: [self._text(cell) for cell in cells] for name, cells in columns.items()}

    def _text(self, cell: Any) -> Any:
        if not isinstance(cell, bytes):
            return cell
        ids = [int.from_bytes(cell[at : at + 4], "little") for at in range(0, len(cell), 4)]
        return self._tokenizer.decode(ids)


def _definition(backend: Any) -> bytes | None:
    """A tokenizer as JSON, without its present padding and truncation, which may differ between ranks; None where it
    has parts that cannot be written.
    """
    try:
        whole: str = backend.to_str()
    except Exception:
        return None
    head, mark, rest = whole.partition('"added_tokens"')
    version = head.partition('"truncation"')[0]
    return f'{version}"truncation":null,"padding":null,{mark}{rest}'.encode() if mark else whole.encode()
