"""Spans in a rank, the profiling decorators, and what the writer makes of them."""

from __future__ import annotations

import asyncio
import functools
import sys
import threading
from collections.abc import AsyncIterator, Generator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swanlab_ray.actors.reduction import spans as reduced_spans
from swanlab_ray.actors.reduction.spans import RankSpans, Span, outside, spans_of
from swanlab_ray.actors.wire.codec import decode_batch, encode_batch
from swanlab_ray.actors.wire.events import Spans
from swanlab_ray.observer import connect, profiling
from swanlab_ray.observer.encoding.numbers import Deferred
from swanlab_ray.observer.profiling import (
    DEFAULT_PROFILING_CONFIG,
    ProfilingConfig,
    swanlab_profile,
    swanlab_profiling_context,
    swanlab_profiling_context_advanced,
)
from swanlab_ray.observer.timing import spans
from swanlab_ray.observer.timing.spans import SpanLog
from tests.incarnations import Cluster, Link, NoSwanLab, mortal, rank, settings_for


class Kept:
    """A span log, and what its flusher would send."""

    def __init__(self) -> None:
        self.queue: list[Deferred] = []
        self.log = SpanLog(self.queue.append)

    def events(self) -> list[Spans]:
        found: list[Spans] = []
        while self.queue and self.queue[0].ready():
            ((event,), rejected) = decode_batch(encode_batch([self.queue.pop(0).encode()]))
            assert not rejected
            assert isinstance(event, Spans)
            found.append(event)
        return found

    def spans(self) -> list[Span]:
        return [span for event in self.events() for span in spans_of(event)]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """Everything is kept, as short as it may be."""
    kept = Kept()
    monkeypatch.setattr(spans, "active", kept.log)
    monkeypatch.setattr(DEFAULT_PROFILING_CONFIG, "min_duration_ms", 0.0)
    return kept


class Worker:
    state = SimpleNamespace(global_step=7)

    @swanlab_profile
    def work(self, value: int) -> int:
        """Works."""
        return value + 1

    @swanlab_profile
    def fail(self) -> None:
        raise KeyError("x")

    @swanlab_profile
    async def wait(self) -> str:
        await asyncio.sleep(0)
        return "waited"

    @swanlab_profile
    def produce(self) -> Generator[int, int | None, int]:
        got = yield 1
        yield got or 2
        return 3

    @swanlab_profile
    async def stream(self) -> AsyncIterator[int]:
        yield 1
        yield 2

    @classmethod
    @swanlab_profile
    def make(cls) -> str:
        return cls.__name__

    @staticmethod
    @swanlab_profile
    def helper(value: int) -> int:
        return value


class Derived(Worker):
    pass


@swanlab_profile
def plain(value: int = 1) -> int:
    return value


def test_a_method_goes_by_the_class_it_is_called_on_at_the_trainer_s_step(kept: Kept) -> None:
    assert Derived().work(1) == 2
    assert Worker.work.__doc__ == "Works."
    with pytest.raises(KeyError):
        Worker().fail()
    assert Derived.make() == "Derived"
    assert Worker.helper(5) == 5
    assert plain() == 1
    got = kept.spans()
    assert [span.name for span in got] == [
        "Time taken: Derived.work",
        "Time taken: Worker.fail",
        "Time taken: Derived.make",
        "Time taken: Worker.helper",
        "Time taken: plain",
    ]
    assert [span.step for span in got] == [7, 7, 7, 0, 0]
    assert all(span.duration >= 0 and span.training for span in got)
    kept.log.step = 9  # what the callback knows goes first
    Worker().work(1)
    assert kept.spans()[0].step == 9


def test_coroutines_and_generators(kept: Kept) -> None:
    worker = Worker()

    async def run() -> list[int]:
        assert await worker.wait() == "waited"
        return [item async for item in worker.stream()]

    assert asyncio.run(run()) == [1, 2]
    assert [span.name.rpartition(".")[2] for span in kept.spans()] == ["wait", "stream", "stream", "stream"]
    generator: Any = worker.produce()
    assert next(generator) == 1
    assert generator.send(5) == 5
    with pytest.raises(StopIteration) as end:
        next(generator)
    assert end.value.value == 3
    assert len(kept.spans()) == 3, "each step of a generator is one span"
    generator = worker.produce()
    assert next(generator) == 1
    with pytest.raises(RuntimeError, match="thrown"):
        generator.throw(RuntimeError("thrown"))
    kept.spans()


def test_without_an_observer_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "active", None)
    assert Worker().work(1) == 2
    with swanlab_profiling_context(Worker(), "x"), spans.span("y"):
        pass
    disabled = connect(mode="disabled")
    with disabled.span("z"), ExitStack() as stack:
        stack.enter_context(disabled.span("y"))
    disabled.step = 3
    disabled.finish()


def test_contexts_and_their_configuration(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Worker()
    with pytest.raises(ZeroDivisionError), swanlab_profiling_context(trainer, "forward_pass"):
        _ = 1 / 0
    config = ProfilingConfig(enabled=True, min_duration_ms=0.0, log_interval=3)
    for _ in range(7):
        with swanlab_profiling_context_advanced(trainer, "frequent_op", config=config):
            pass
    with swanlab_profiling_context_advanced(trainer, "short", config=ProfilingConfig(min_duration_ms=60_000)):
        pass
    with swanlab_profiling_context_advanced(trainer, "off", config=ProfilingConfig(enabled=False)):
        pass
    monkeypatch.setattr(DEFAULT_PROFILING_CONFIG, "enabled", False)
    trainer.work(1)
    with swanlab_profiling_context(trainer, "off"), swanlab_profiling_context_advanced(trainer, "off"):
        pass
    names = [span.name for span in kept.spans()]
    assert names == ["Time taken: Worker.forward_pass", *["Time taken: Worker.frequent_op"] * 3]


def test_should_log() -> None:
    config = ProfilingConfig()
    assert (config.enabled, config.min_duration_ms, config.log_interval) == (True, 0.1, 1)
    assert config.should_log("f", 0.0001)
    assert not config.should_log("f", 0.00009)
    config = ProfilingConfig(log_interval=3)
    assert [config.should_log("f", 1.0) for _ in range(6)] == [True, False, True, False, False, True]
    assert config.should_log("g", 1.0), "counted by name"
    for wrong in (
        {"log_interval": 0},
        {"log_interval": 1.5},
        {"min_duration_ms": -1},
        {"min_duration_ms": float("nan")},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ProfilingConfig(**wrong)


def test_spans_nest_by_their_times_and_in_tasks_by_their_parents(kept: Kept) -> None:
    with spans.span("outer"), ExitStack() as stack:
        stack.enter_context(spans.span("inner"))
    inner, outer = kept.spans()
    assert (inner.parent, outer.parent) == (0, 0)
    assert outer.begin < inner.begin <= inner.end <= outer.end

    async def task(name: str) -> None:
        with spans.span(name):
            await asyncio.sleep(0)
            with spans.span(f"{name} inside"):
                await asyncio.sleep(0)
            Worker().work(1)

    async def both() -> None:
        await asyncio.gather(task("a"), task("b"))

    asyncio.run(both())
    found = kept.spans()
    by_name = {span.name: span for span in found}
    a, b = by_name["a"], by_name["b"]
    assert a.begin < b.begin < a.end < b.end, "they overlap"
    assert (a.parent, b.parent) == (-1, -1)
    assert by_name["a inside"].parent == a.begin
    assert by_name["b inside"].parent == b.begin
    assert {span.parent for span in found if span.name == "Time taken: Worker.work"} == {a.begin, b.begin}
    thread = threading.Thread(target=plain, name="loader")
    with spans.span("outer"):
        thread.start()
        thread.join()
    other, outer = kept.spans()
    assert (other.parent, other.training, outer.training) == (0, False, True)


def test_what_finds_no_room_is_counted(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "CAPACITY", 10)
    monkeypatch.setattr(spans, "SPANS_PER_EVENT", 4)
    for number in range(15):
        with spans.span(f"s{number}"):
            pass
    assert len(kept.queue) == 1, "and nobody else's events make room for them"
    kept.log.close()
    with spans.span("after the end"):
        pass
    events = kept.events()
    assert sum(event.dropped for event in events) == 5
    assert [span.name for event in events for span in spans_of(event)] == [f"s{number}" for number in range(5, 15)]


def test_an_event_that_found_no_room_is_announced_again(kept: Kept) -> None:
    plain()
    kept.queue.pop().lost()
    plain()
    assert len(kept.spans()) == 2


def test_names_of_all_kinds(kept: Kept) -> None:
    class Unspeakable:
        def __str__(self) -> str:
            raise RuntimeError

    names: list[Any] = ["\ud800", 3, ["a", "list"], Unspeakable()]
    for name in names:
        with spans.span(name):
            pass
    assert [span.name for span in kept.spans()] == ["?", "3", "['a', 'list']", "Unspeakable"]


def test_what_is_decorated_may_be_of_any_kind(kept: Kept) -> None:
    class Kinds:
        @swanlab_profile
        @classmethod
        def by_class(cls) -> str:
            return cls.__name__

        @swanlab_profile
        @staticmethod
        def static(value: int) -> int:
            return value

        @swanlab_profile  # type: ignore[prop-decorator]
        @property
        def read(self) -> int:
            return 5

        @property
        def state(self) -> None:
            raise RuntimeError("not ready")

    kinds = Kinds()
    part: Any = swanlab_profile(functools.partial(plain, 2))
    assert (Kinds.by_class(), kinds.static(3), kinds.read, part()) == ("Kinds", 3, 5, 2)
    assert [span.name.rpartition(".")[2] for span in kept.spans()] == [
        "by_class",
        "static",
        "read",
        "Time taken: plain",
        "Time taken: partial",
    ]
    with pytest.raises(TypeError, match="takes a function, not 3"):
        swanlab_profile(3)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="pass a ProfilingConfig"):
        swanlab_profiling_context_advanced(kinds, "x", config={})  # type: ignore[arg-type]


def test_a_configuration_is_checked_when_it_is_changed() -> None:
    config = ProfilingConfig()
    wrong: dict[str, Any] = {"enabled": "no", "min_duration_ms": "1", "log_interval": None}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            setattr(config, name, value)
    assert config == ProfilingConfig()


class CudaEvent:
    """Stands in for ``torch.cuda.Event``."""

    done = False
    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        CudaEvent.made += 1
        self.at = CudaEvent.made

    def record(self) -> None: ...

    def query(self) -> bool:
        return CudaEvent.done

    def elapsed_time(self, end: CudaEvent) -> float:
        return 2.5 * (end.at - self.at)


def test_time_on_a_gpu_is_read_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(is_initialized=lambda: True, is_current_stream_capturing=lambda: False, Event=CudaEvent)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    kept = Kept()
    kept.log.cuda = True
    with spans.Span(kept.log, "forward"):
        pass
    assert kept.spans() == []
    assert kept.queue, "it is still waited for"
    assert kept.events() == []
    CudaEvent.done = True
    assert [(span.name, span.gpu) for span in kept.spans()] == [("forward", 2_500_000)]
    CudaEvent.done = False
    with spans.Span(kept.log, "on the GPU"):
        pass
    kept.log.cuda = False
    with spans.Span(kept.log, "after it"):
        pass
    assert kept.spans() == [], "in the order of their ends"
    kept.log.cuda = True

    def failed(event: CudaEvent) -> bool:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(CudaEvent, "query", failed)
    assert [(span.name, span.gpu) for span in kept.spans()] == [("on the GPU", -1), ("after it", -1)]
    cuda.is_initialized = lambda: False
    with spans.Span(kept.log, "on the host"):
        pass
    assert kept.spans()[0].gpu == -1


def spans_at(*records: tuple[str, int, int, int]) -> Spans:
    """Spans of one rank, given as name, step, begin and end in milliseconds."""
    names = list(dict.fromkeys(name for name, *_ in records))
    count = len(records)
    return Spans(
        time_ns=0,
        begin_ns=1_000_000_000,
        dropped=0,
        names=names,
        threads=["training"],
        thread=[0] * count,
        name=[names.index(name) for name, *_ in records],
        step=[step for _, step, _, _ in records],
        begins=[begin * 10**6 for _, _, begin, _ in records],
        durations=[(end - begin) * 10**6 for _, _, begin, end in records],
        parents=[],
        gpu=[],
    )


def test_what_the_spans_of_a_step_add_up_to() -> None:
    found = RankSpans()
    assert not found.take(
        spans_at(
            ("data", 1, 0, 10),
            ("forward", 1, 20, 30),
            ("Time taken: T.loss", 1, 31, 33),
            ("Time taken: T.loss", 1, 35, 41),
            ("backward", 1, 30, 60),  # around the two
            ("forward", 1, 70, 75),
        )
    )
    times, late = found.take(spans_at(("data", 2, 100, 110), ("forward", 1, 60, 120)))
    assert late.step == 1, "it had begun before"
    assert late.by_name == pytest.approx({"forward": 0.06})
    assert not late.phases
    assert times.by_name == pytest.approx(
        {"data": 0.010, "forward": 0.015, "Time taken: T.loss": 0.004, "backward": 0.030}
    )
    assert {name: (phase.own, phase.before) for name, phase in times.phases.items()} == {
        "data": pytest.approx((0.010, 0.0)),
        "forward": pytest.approx((0.015, 0.020)),
        "backward": pytest.approx((0.022, 0.0)),
        "Time taken: T.loss": pytest.approx((0.008, 0.0)),
    }
    assert list(times.phases) == ["data", "forward", "backward", "Time taken: T.loss"]
    (times,) = found.close()
    assert times.step == 2
    assert times.phases["data"].before == pytest.approx(0.025)


def test_steps_and_times_that_cannot_be_are_left_out_and_counted() -> None:
    """From step 0 to what SwanLab can hold; a clock that was set back made the third one end before it began."""
    event = spans_at(("a", 0, 0, 1), ("b", -1, 1, 2), ("c", 1, 9, 2), ("d", 2**63 - 1, 3, 4), ("e", 2**63, 4, 5))
    assert outside(event) == 2
    assert [(span.name, span.step, span.duration) for span in spans_of(event)] == [
        ("a", 0, 10**6),
        ("c", 1, 0),
        ("d", 2**63 - 1, 10**6),
    ]
    assert outside(spans_at(("a", 0, 0, 1), ("d", 2**63 - 1, 3, 4))) == outside(spans_at()) == 0


def test_names_that_are_added_up_in_a_step_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that came first are added up to the end; further ones are in the journal only."""
    monkeypatch.setattr(reduced_spans, "NAMES_PER_STEP", 3)
    found = RankSpans()
    names = [f"n{number}" for number in range(5)] * 2
    assert not found.take(spans_at(*((name, 1, 10 * at, 10 * at + 1) for at, name in enumerate(names))))
    (times,) = found.close()
    assert times.by_name == pytest.approx({"n0": 0.002, "n1": 0.002, "n2": 0.002})
    assert list(times.phases) == ["n0", "n1", "n2"]


def test_overlapping_tasks_and_very_many_spans_count_their_time_once() -> None:
    found = RankSpans()
    found.take(spans_at(*(("generate", 1, n, 100 + n) for n in range(10))))
    (times,) = found.close()
    assert times.seconds == pytest.approx(0.109)
    children = [("child", 2, 200 + 2 * n, 201 + 2 * n) for n in range(6000)]
    found.take(spans_at(*children, ("parent", 2, 200, 12_200)))
    (times,) = found.close()
    assert {name: phase.own for name, phase in times.phases.items()} == pytest.approx({"child": 6.0, "parent": 6.0})
    found.take(spans_at(*((name, 3, begin + 20_000, end + 20_000) for name, _, begin, end in children)))
    (times,) = found.close()
    assert times.phases["child"].own == pytest.approx(6.0)
    assert times.phases["child"].before == pytest.approx(5.999 + 8.0)


def test_steps_that_are_run_again_in_the_same_life() -> None:
    found = RankSpans()
    steps = [found.take(spans_at(("data", step, 10 * n, 10 * n + 5))) for n, step in enumerate([7, 8, 7, 8, 9])]
    assert [times.step for over in steps for times in over] == [7, 8, 7, 8]


def test_series_over_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over ranks under the span's name, the view over ranks beside it, nothing by rank."""
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path))
    ranks = [rank(cluster, Link(cluster), number, 2) for number in range(2)]
    assert all(observer.wait_ready(20) for observer in ranks)
    for step in range(5):
        for observer in ranks:
            observer.step = step
            with observer.span("forward"), observer.span("layer"):
                pass
            if observer.rank == 0:
                with observer.span("checkpoint"):
                    pass
    for observer in ranks:
        assert observer.finish()
    assert cluster.writer is not None
    sink = cluster.writer._parts.reducer.sink
    assert isinstance(sink, NoSwanLab)
    by_name: dict[str, dict[int, float]] = {}
    for step, values in sink.rows:
        for name, value in values.items():
            assert by_name.setdefault(name, {}).setdefault(step, value) == value
    assert set(by_name) == {
        *(f"profiling/{name}" for name in ("forward", "layer", "checkpoint")),
        *(f"ranks/profiling/{name}/{what}" for name in ("forward", "layer") for what in ("max", "p95", "argmax")),
        "ranks/straggler",
        "ranks/straggler_score",
    }
    assert all(set(values) == set(range(5)) for values in by_name.values())
    assert all(0 < by_name["profiling/layer"][step] <= by_name["profiling/forward"][step] for step in range(5))


def test_a_fast_loop_does_not_flood_swanlab(monkeypatch: pytest.MonkeyPatch) -> None:
    from swanlab_ray.actors.reduction import timings

    rows: list[tuple[int, dict[str, float]]] = []
    said: list[str] = []
    reduced = timings.Timings(lambda step, time_ns, values: rows.append((step, values)), said.append)
    reduced.set_ranks({0}, 0)
    for step in range(1000):
        reduced.take(0, spans_at(("forward", step, 10 * step, 10 * step + 5)), 0.0, lambda scalars: scalars)
    reduced.end_rank(0, 0.0, lambda scalars: scalars)
    assert timings.BURST <= len(rows) <= timings.BURST + 11, "a burst, then one a second"
    for number in range(timings.NAMES + 1):
        reduced.take(0, spans_at((f"n{number}", 1000 + number, 20_000, 20_001)), 0.0, lambda scalars: scalars)
    reduced.end_rank(0, 0.0, lambda scalars: scalars)
    assert said == ["There are more than 200 names of spans; of the others SwanLab gets no series."]
    assert len({name for _, values in rows for name in values}) == timings.NAMES


def test_the_names_users_know() -> None:
    assert {
        "swanlab_profile",
        "swanlab_profiling_context",
        "swanlab_profiling_context_advanced",
        "ProfilingConfig",
        "DEFAULT_PROFILING_CONFIG",
    } <= set(vars(profiling))
