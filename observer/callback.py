"""The callback for Transformers and TRL trainers: on every rank, nothing else to do."""

from __future__ import annotations

import functools
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import Trainer, TrainerCallback

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.observer import completions
from swanlab_ray.observer.completions import CompletionCapture
from swanlab_ray.observer.encoding.redact import configuration
from swanlab_ray.observer.job.identity import trial_of_tune
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.script.ending import describe, headline
from swanlab_ray.observer.script.notices import logger
from swanlab_ray.observer.script.wrapping import Wrapped
from swanlab_ray.observer.session import connect, current
from swanlab_ray.observer.timing.phases import Phases
from swanlab_ray.observer.trainers.internals import has_callback
from swanlab_ray.observer.trainers.own_loss import OwnLoss
from swanlab_ray.observer.trainers.run_config import LONGEST_REASON, run_config

_TOTALS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
FLUSH_AT_END_S = 30.0

Method = TypeVar("Method", bound=Callable[..., None])


def _never_raises(method: Method) -> Method:
    """An exception in a callback would end the training."""

    @functools.wraps(method)
    def guarded(self: ObserverCallback, *args: Any, **kwargs: Any) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            if self.settings.strict:
                raise
            self.say_once(f"{method.__name__} failed: {headline(error)[:LONGEST_REASON]}; the training goes on.")

    return guarded  # type: ignore[return-value]


class ObserverCallback(TrainerCallback):
    """Reports a Trainer to the run's writer.

    Rank 0 sends what the Trainer logs, which is reduced over ranks already, under the names of SwanLab's own callback
    (``train/loss``, ``eval/loss``), and the configuration. Every rank sends its progress, its own ``loss``, its
    ``step_time`` (seconds, with the wait for data), the phases of its steps as spans, and completions.

    It connects when something is trained or evaluated: one that is only made, copied or pickled leaves no run. Where a
    model takes long to load, call ``connect(settings)`` before; the callback joins that run.

    Args:
        settings: see :class:`ObserverSettings`; by default read from the environment.
        config: what rank 0 adds to the run's configuration: a mapping, or an object with named parts.
        overrides: fields of the settings, instead of ``settings``.

    Raises:
        SettingsError: a setting is wrong.
    """

    def __init__(self, settings: ObserverSettings | None = None, config: Any = None, **overrides: Any) -> None:
        self.settings = settings if settings is not None else ObserverSettings(**overrides)
        self._config = config
        self._begin()

    def _begin(self) -> None:
        """What belongs to the trainings of this callback in this process."""
        self.observer: Observer | None = None
        self._said: set[str] = set()
        self._trainers: weakref.WeakKeyDictionary[Any, OwnLoss] = weakref.WeakKeyDictionary()
        self._trainer: weakref.ref[Any] | None = None
        self._training = False
        self._offset = 0  # steps of trainings that this process has done before
        self._mark = 0.0
        self._configured = False
        self._trials = 0
        self._capture: CompletionCapture | None = None
        self._phases: Phases | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, here or in another process: it begins anew, with the same settings."""
        begun = object.__new__(ObserverCallback)
        begun._begin()
        return {name: value for name, value in vars(self).items() if name not in vars(begun)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def attach(self, trainer: Any) -> ObserverCallback:
        """Watch a trainer. Only needed for one that was made before this callback was added to it."""
        self._watch(trainer)
        return self

    @_never_raises
    def _watch(self, trainer: Any) -> None:
        self._trainer = weakref.ref(trainer)
        if trainer not in self._trainers:
            trainer.train = Wrapped(trainer.train, self._around_train)
            self._trainers[trainer] = OwnLoss(trainer)

    def say_once(self, sentence: str) -> None:
        """Warn once about a sentence."""
        if sentence not in self._said and len(self._said) < 100:
            self._said.add(sentence)
            logger.warning(sentence)

    # Trainer events. Their order: init_end, train_begin, step_begin, ..., step_end, log, evaluate, save, train_end.

    @_never_raises
    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._find_trainer()

    @_never_raises
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._find_trainer()
        observer = self._of_a_trial() if state.is_hyper_param_search else self._connected()
        if self.settings.log_model and observer.rank == 0:
            self.say_once("log_model is set, but SwanLab cannot store checkpoints yet; they stay in output_dir only.")
        self._training = True
        if state.global_step == 0:
            # Trained again from the start (a second train(), a smaller batch size after running out of memory): the
            # steps go on after the last one, since SwanLab keeps the first value of a step.
            self._offset = observer.trained_steps
        observer.set_result(None)
        self._take_loss()
        self._mark = time.perf_counter()
        self._configure(observer, args, state, kwargs.get("model"))
        self._capture_completions(observer)
        self._measure_phases(observer)
        self._tell_progress(state)

    @_never_raises
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._phases is not None:
            self._phases.begin_step()

    @_never_raises
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._phases is not None:
            self._phases.begin_optimizer()

    @_never_raises
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._phases is not None:
            self._phases.end_optimizer()

    @_never_raises
    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.observer is not None:
            self.observer.spans.moved()  # a long evaluation is no hang

    @_never_raises
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        observer = self.observer
        if observer is None:
            return
        now = time.perf_counter()
        measured = {"step_time": now - self._mark}
        self._mark = now
        loss = self._take_loss()
        if loss is not None:
            measured["loss"] = loss
        self._tell_progress(state)
        observer.log_rank(measured, step=observer.trained_steps)

    @_never_raises
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        observer = self._connected()
        if observer.rank == 0 and logs:
            values = {_swanlab_name(key): value for key, value in logs.items()}
            values["train/global_step"] = state.global_step
            observer.log_job(values, step=self._offset + state.global_step)

    @_never_raises
    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        observer = self._connected()
        if observer.rank == 0 and metrics:
            values = {_swanlab_name(key): value for key, value in metrics.items()}
            observer.log_job(values, step=self._offset + state.global_step)
        self._succeed_unless_training()

    @_never_raises
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        observer = self._connected()
        if not self._training:
            if not self._configured:
                self._configure(observer, args, state, kwargs.get("model"))
            self._succeed_unless_training()
        self._mark = time.perf_counter()

    @_never_raises
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    @_never_raises
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end_training()
        self._tell_progress(state)
        self._settle("success", None)

    # What they share.

    def _connected(self) -> Observer:
        if self.observer is None or self.observer.finished:
            self.observer = connect(self.settings)
        return self.observer

    def _of_a_trial(self) -> Observer:
        """A search for hyperparameters trains again and again: each trial is a run."""
        earlier = self.observer or current()
        if earlier is not None and not earlier.finished:
            state, error = earlier.result
            if state is None:  # it begins again, with a smaller batch
                self.observer = earlier
                return earlier
            earlier.finish(state, error)
        self._trials += 1
        trial = trial_of_tune() or str(self._trials)
        named = {name: getattr(self.settings, name) for name in ("run_id", "experiment_name")}
        names = {name: f"{given}-{trial}" for name, given in named.items() if given is not None}
        self.observer = connect(self.settings.model_copy(update=names))
        return self.observer

    @_never_raises
    def _capture_completions(self, observer: Observer) -> None:
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is not None:
            self._capture = completions.attach(trainer, observer)
            if self._capture is not None:
                self._capture.step_offset = self._offset

    @_never_raises
    def _measure_phases(self, observer: Observer) -> None:
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is not None:
            if self._phases is None:
                self._phases = Phases(trainer, observer.spans)
            self._phases.step_offset = self._offset
            observer.spans.step = self._offset + trainer.state.global_step

    @_never_raises
    def _end_training(self) -> None:
        self._training = False
        if self._phases is not None:  # it wraps what the capture has wrapped
            self._phases.remove()
            self._phases = None
        if self._capture is not None:
            self._capture.detach()
            self._capture = None

    def _settle(self, state: Any, error: str | None) -> None:
        if self.observer is None:
            return
        self.observer.set_result(state, error)
        if self.observer.in_ray_train or trial_of_tune():
            # Ray ends the worker without exit handlers, so nothing may be left here.
            self.observer.flush(FLUSH_AT_END_S)

    def _succeed_unless_training(self) -> None:
        if not self._training:
            self._settle("success", None)

    def _tell_progress(self, state: Any) -> None:
        assert self.observer is not None
        step = self.observer.trained_steps = self._offset + state.global_step
        self.observer.progress(step, self._offset + state.max_steps, state.epoch)

    @_never_raises
    def _configure(self, observer: Observer, args: Any, state: Any, model: Any) -> None:
        if observer.rank != 0:
            return
        self._configured = True
        left_out: dict[str, str] = {}
        trainer = self._trainer() if self._trainer is not None else None
        described = run_config(args, model, state, trainer, left_out.__setitem__)
        observer.config({**described, **configuration(self._config)})
        if left_out:
            reasons = ", ".join(f"{name} ({why})" for name, why in left_out.items())
            self.say_once(f"Not in the configuration: {reasons[: 3 * LONGEST_REASON]}; the rest of it is.")

    def _find_trainer(self) -> None:
        """Events do not carry the trainer, so it is looked for among the callers: the one that holds this callback."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            candidate = frame.f_locals.get("self")
            if issubclass(type(candidate), Trainer) and has_callback(candidate, self):  # isinstance asks the object
                self.attach(candidate)
                return
            frame = frame.f_back

    def _take_loss(self) -> Any:
        trainer = self._trainer() if self._trainer is not None else None
        own = None if trainer is None else self._trainers.get(trainer)
        return None if own is None else own.take()

    def _around_train(self, train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        except BaseException as error:
            self._end_training()
            self._settle(*describe(error))
            raise


def _swanlab_name(name: Any) -> str:
    """The name that SwanLab's own Transformers callback gives a Trainer metric."""
    name = str(name)
    if name in _TOTALS:
        return f"single_value/{name}"
    for prefix in ("eval", "test"):
        if name.startswith(f"{prefix}_"):
            return f"{prefix}/{name[len(prefix) + 1 :]}"
    return f"train/{name}"
