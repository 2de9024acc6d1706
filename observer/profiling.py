"""Where the time of a trainer goes: a decorator and two context managers, under the names that Axolotl users know.

A measured call is a span (see :mod:`swanlab_ray.observer.timing.spans`) named ``Time taken: ClassName.method``; SwanLab
gets ``profiling/Time taken: ClassName.method`` in seconds, at the trainer's step: of one rank as it is, of several as
the mean over ranks, with the view over ranks beside it. Calls that raise are measured as well. While no observer is
connected nothing is measured.
"""

from __future__ import annotations

import functools
import inspect
from asyncio import _get_running_loop
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import count
from numbers import Integral, Real
from threading import get_ident
from time import perf_counter_ns
from types import TracebackType
from typing import Any, TypeVar

from swanlab_ray.observer.timing import spans
from swanlab_ray.observer.timing.spans import Span, SpanLog
from swanlab_ray.observer.trainers.algorithms import class_name

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass
class ProfilingConfig:
    """Which calls are logged. Its values may be changed at any time.

    Raises:
        ValueError: a value is wrong, also when it is set later.
    """

    enabled: bool = True
    min_duration_ms: float = 0.1
    """Calls that take less than this many milliseconds are not logged."""
    log_interval: int = 1
    """Of the calls that take long enough, the first and every Nth are logged, counted by name."""
    _calls: dict[str, Iterator[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __setattr__(self, name: str, value: Any) -> None:
        match name:
            case "enabled" if not isinstance(value, bool):
                raise ValueError(f"enabled is {value!r}: pass True or False.")
            case "min_duration_ms" if not (isinstance(value, Real) and float(value) >= 0):
                raise ValueError(f"min_duration_ms is {value!r}: pass 0 or more milliseconds.")
            case "log_interval" if isinstance(value, bool) or not (isinstance(value, Integral) and int(value) >= 1):
                raise ValueError(f"log_interval is {value!r}: pass a whole number of 1 or more.")
        object.__setattr__(self, name, value)

    def should_log(self, func_name: str, duration_seconds: float) -> bool:
        """Whether a call that took so long is logged; counts it."""
        if not self.enabled or duration_seconds * 1000 < self.min_duration_ms:
            return False
        if self.log_interval == 1:
            return True
        calls = next(self._calls.setdefault(func_name, count(1)))
        return calls == 1 or calls % self.log_interval == 0


DEFAULT_PROFILING_CONFIG = ProfilingConfig()
"""What the decorator, the plain context manager and the spans of trainers heed; change it at any time.
``DEFAULT_PROFILING_CONFIG.enabled = False`` turns profiling off."""


def swanlab_profile(func: Function) -> Function:
    """Measure every call of a method or function.

    Of an async function the whole call is measured, with its waiting; of a generator each of its steps, without the
    time between them. Methods of a class (``classmethod``), static ones and properties may be given as such.
    """
    given: Any = func
    if isinstance(given, (classmethod, staticmethod)):
        return type(given)(swanlab_profile(given.__func__))  # type: ignore[return-value]
    if isinstance(given, property):
        getter = given.fget and swanlab_profile(given.fget)
        return property(getter, given.fset, given.fdel, given.__doc__)  # type: ignore[return-value]
    if not callable(given):
        raise TypeError(f"@swanlab_profile takes a function, not {given!r}.")
    name_of = _namer(func)

    def measured(args: tuple[Any, ...]) -> _Profiled:
        return _Profiled(args[0] if args else None, name_of(args), DEFAULT_PROFILING_CONFIG)

    if inspect.isasyncgenfunction(func):

        @functools.wraps(func)
        async def stepped_async(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            generator = func(*args, **kwargs)
            step: Callable[[], Any] = generator.__anext__
            try:
                while True:
                    with measured(args):
                        try:
                            item = await step()
                        except StopAsyncIteration:
                            return
                    try:
                        sent = yield item
                        step = functools.partial(generator.asend, sent)
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        step = functools.partial(generator.athrow, error)
            finally:
                await generator.aclose()

        return stepped_async  # type: ignore[return-value]

    if inspect.isgeneratorfunction(func):

        @functools.wraps(func)
        def stepped(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            generator = func(*args, **kwargs)
            step: Callable[[], Any] = generator.__next__
            try:
                while True:
                    with measured(args):
                        try:
                            item = step()
                        except StopIteration as end:
                            return end.value
                    try:
                        sent = yield item
                        step = functools.partial(generator.send, sent)
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        step = functools.partial(generator.throw, error)
            finally:
                generator.close()

        return stepped  # type: ignore[return-value]

    if inspect.iscoroutinefunction(func):

        @functools.wraps(func)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            with measured(args):
                return await func(*args, **kwargs)

        return awaited  # type: ignore[return-value]

    if not _is_method(func):

        @functools.wraps(func)
        def called(*args: Any, **kwargs: Any) -> Any:
            with measured(args):
                return func(*args, **kwargs)

        return called  # type: ignore[return-value]

    names: dict[type, str] = {}

    @functools.wraps(func)
    def profiled(*args: Any, **kwargs: Any) -> Any:
        # What _Profiled does, in place: methods may be called often.
        log = spans.active
        config = DEFAULT_PROFILING_CONFIG
        if log is None or not config.enabled:
            return func(*args, **kwargs)
        if log.cuda or _get_running_loop() is not None:
            with measured(args):
                return func(*args, **kwargs)
        step = log.step
        begin = perf_counter_ns()
        try:
            return func(*args, **kwargs)
        finally:
            end = perf_counter_ns()
            if args and end - begin >= config.min_duration_ms * 1e6:
                kind = type(args[0])
                name = names.get(kind) or names.setdefault(kind, name_of(args))
                if config.log_interval == 1 or config.should_log(name, (end - begin) * 1e-9):
                    if len(log.records) >= spans.CAPACITY:
                        log.make_room()
                    if step is None:
                        step = _step_of(args[0], log)
                    log.records.append((name, step, begin, end, get_ident(), 0, None))
                    if not log.announced:
                        log.announce()

    return profiled  # type: ignore[return-value]


def swanlab_profiling_context(trainer: Any, func_name: str) -> _Profiled:
    """Measure a block: ``with swanlab_profiling_context(self, "forward_pass"): ...``.

    Args:
        trainer: its class names the metric, ``profiling/Time taken: ClassName.func_name``.
        func_name: what the block does.
    """
    return _Profiled(trainer, _metric(trainer, func_name), DEFAULT_PROFILING_CONFIG)


def swanlab_profiling_context_advanced(
    trainer: Any, func_name: str, config: ProfilingConfig | None = None
) -> _Profiled:
    """The same, logged as ``config`` says; by default as :data:`DEFAULT_PROFILING_CONFIG` does.

    Raises:
        TypeError: ``config`` is none.
    """
    if config is not None and not isinstance(config, ProfilingConfig):
        raise TypeError(f"config is {config!r}: pass a ProfilingConfig, or leave it out.")
    return _Profiled(trainer, _metric(trainer, func_name), DEFAULT_PROFILING_CONFIG if config is None else config)


class _Profiled(Span):
    """A span that is kept if its configuration says so."""

    __slots__ = ("_config", "_measures")

    def __init__(self, trainer: Any, name: str, config: ProfilingConfig) -> None:
        log = spans.active
        self._config = config
        self._measures = log is not None and config.enabled
        if log is not None and self._measures:
            super().__init__(log, name)
            if log.step is None:
                self._step = _step_of(trainer, log)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._measures:
            return
        if self._config.should_log(self.name, (perf_counter_ns() - self._begin) * 1e-9):
            super().__exit__(kind, error, trace)
        else:
            self._forget()


def _metric(owner: Any, func_name: str) -> str:
    return f"Time taken: {class_name(owner)}.{func_name}"


def _first_parameter(func: Callable[..., Any]) -> str:
    try:
        return next(iter(inspect.signature(func).parameters), "")
    except (TypeError, ValueError):
        return ""


def _is_method(func: Callable[..., Any]) -> bool:
    return _first_parameter(func) == "self"


def _namer(func: Callable[..., Any]) -> Callable[[tuple[Any, ...]], str]:
    """What names a call, given its arguments: a method goes by the class of the object it is called on."""
    own_name = getattr(func, "__qualname__", type(func).__name__)
    plain = f"Time taken: {own_name.rpartition('<locals>.')[2]}"
    if _first_parameter(func) not in ("self", "cls"):
        return lambda args: plain

    def name_of(args: tuple[Any, ...]) -> str:
        if not args:
            return plain
        return f"Time taken: {class_name(args[0])}.{own_name.rpartition('.')[2]}"

    return name_of


def _step_of(trainer: Any, log: SpanLog) -> int:
    """The trainer's step; where there is none, the one after what was logged last."""
    try:
        step = getattr(getattr(trainer, "state", None), "global_step", None)
    except Exception:  # this may be any object
        step = None
    return int(step) if isinstance(step, Integral) and 0 <= int(step) < 1 << 63 else log.step_now()
