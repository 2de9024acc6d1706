"""The phases of a Trainer's step as spans, without a change to it: its methods are wrapped on the instance, and let go
of at the end of the training."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from swanlab_ray.observer.profiling import DEFAULT_PROFILING_CONFIG
from swanlab_ray.observer.script.wrapping import Wrapped
from swanlab_ray.observer.timing.spans import Span, SpanLog
from swanlab_ray.observer.trainers.internals import BACKWARD, BATCHES
from swanlab_ray.observer.trainers.trl_internals import PHASES


class Phases:
    """Measures the phases of one trainer, and besides ``data`` and ``optimizer``.

    Args:
        trainer: a Transformers ``Trainer``, or one derived from it.
        log: takes the spans.
    """

    def __init__(self, trainer: Any, log: SpanLog) -> None:
        self.step_offset = 0
        """Steps of trainings before this one."""
        self._trainer = weakref.ref(trainer)
        self._log = log
        self._active = True
        self._evaluating = False
        self._optimizer: Span | None = None
        self._wrapped: list[tuple[weakref.ref[Any], str, Wrapped, bool]] = []
        self._wrap(trainer, BATCHES, self._with_data)
        for method, phase in PHASES.items():
            self._wrap(trainer, method, functools.partial(self._measured, phase))
        self._wrap(getattr(trainer, "accelerator", None), BACKWARD, functools.partial(self._measured, "backward"))

    def remove(self) -> None:
        """Let go of the trainer."""
        self._active = False
        self.end_optimizer()
        self._log.step = None  # nobody keeps it any more
        for reference, name, wrapper, own in reversed(self._wrapped):
            holder = reference()
            # Where somebody has wrapped it once more, ours stays inside and does nothing.
            if holder is not None and vars(holder).get(name) is wrapper:
                vars(holder).pop(name)
                if own:
                    vars(holder)[name] = wrapper.method
        self._wrapped.clear()

    def begin_step(self) -> None:
        """What follows belongs to the next step."""
        with suppress(Exception):  # of a trainer of another kind; this is called within its training
            trainer: Any = self._trainer()
            self._log.step = self.step_offset + trainer.state.global_step + 1

    def begin_optimizer(self) -> None:
        """The optimizer's step begins."""
        self.end_optimizer()
        if DEFAULT_PROFILING_CONFIG.enabled:
            self._optimizer = Span(self._log, "optimizer")

    def end_optimizer(self) -> None:
        """The optimizer's step is over."""
        if self._optimizer is not None:
            self._optimizer.__exit__(None, None, None)
            self._optimizer = None

    def _wrap(self, holder: Any, name: str, around: Callable[..., Any]) -> None:
        """Let ``around(method, *args, **kwargs)`` be called instead of a method."""
        method = getattr(holder, name, None)
        if not callable(method):
            return

        def measured(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            # The phases of an evaluation are part of it, not of a training step.
            if not self._active or self._evaluating or not DEFAULT_PROFILING_CONFIG.enabled:
                return method(*args, **kwargs)
            return around(method, *args, **kwargs)

        wrapped = Wrapped(method, measured)
        own = name in vars(holder)
        setattr(holder, name, wrapped)
        self._wrapped.append((weakref.ref(holder), name, wrapped, own))

    def _measured(self, phase: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._evaluating = phase == "evaluate"
        try:
            with Span(self._log, phase):
                return method(*args, **kwargs)
        finally:
            self._evaluating = False

    def _with_data(self, method: Callable[..., Any], epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """``get_batch_samples``: only its calls of ``next()`` are the wait for data, since ranks meet in the rest."""
        self.begin_step()
        return method(_MeasuredIterator(epoch_iterator, self._log), *args, **kwargs)


class _MeasuredIterator:
    """An iterator, with a span around each step."""

    def __init__(self, iterator: Iterator[Any], log: SpanLog) -> None:
        self._iterator = iterator
        self._log = log

    def __iter__(self) -> _MeasuredIterator:
        return self

    def __next__(self) -> Any:
        with Span(self._log, "data"):
            return next(self._iterator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)
