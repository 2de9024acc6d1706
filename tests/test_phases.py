"""The phases of a Trainer, measured without a change to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from swanlab_ray.actors.journal.records import Batch
from swanlab_ray.actors.reduction.spans import Span, spans_of
from swanlab_ray.actors.wire.codec import decode_batch
from swanlab_ray.actors.wire.events import Spans
from swanlab_ray.observer import Observer, ObserverCallback, ObserverSettings
from swanlab_ray.observer import callback as callback_module
from swanlab_ray.observer.profiling import DEFAULT_PROFILING_CONFIG, swanlab_profile
from swanlab_ray.observer.timing import spans as spans_module
from swanlab_ray.observer.trainers.trl_internals import PHASES
from tests import rlhf, tiny
from tests.incarnations import Cluster, Link, mortal, rank, settings_for

STEPS = 4


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Callbacks report here."""
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path / "swanlog"))

    def connect(settings: ObserverSettings) -> Observer:
        observer = rank(cluster, Link(cluster))
        monkeypatch.setattr(spans_module, "active", observer.spans)
        return observer

    monkeypatch.setattr(callback_module, "connect", connect)
    return cluster


def logged(cluster: Cluster) -> list[Span]:
    from swanlab_ray.actors.runs.merging import merged

    return [
        span
        for entry in merged(cluster.files)
        if isinstance(entry, Batch)
        for event in decode_batch(entry.data)[0]
        if isinstance(event, Spans)
        for span in spans_of(event)
    ]


def steps_of(spans: list[Span], name: str) -> list[int]:
    return [span.step for span in spans if span.name == name]


def around(span: Span, spans: list[Span]) -> str | None:
    """Name of the innermost span around this one."""
    outer = [other for other in spans if other is not span and other.begin <= span.begin and span.end <= other.end]
    return min(outer, key=lambda other: other.duration).name if outer else None


def finish(callback: ObserverCallback) -> None:
    assert callback.observer is not None
    assert callback.observer.finish()


class Measured(Trainer):
    @swanlab_profile
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs)


def test_every_phase_of_every_step(cluster: Cluster, tmp_path: Path) -> None:
    callback = ObserverCallback(cluster.settings)
    trainer = tiny.trainer(
        tmp_path,
        [callback],
        Measured,
        max_steps=STEPS,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.eval_dataset = trainer.train_dataset
    trainer.train()
    for name in (*PHASES, "training_step"):
        assert getattr(vars(trainer).get(name), "__name__", "") != "measured"
    assert "backward" not in vars(trainer.accelerator)
    finish(callback)
    spans = logged(cluster)
    steps, twice = [1, 2, 3, 4], [1, 1, 2, 2, 3, 3, 4, 4]
    assert {name: steps_of(spans, name) for name in {span.name for span in spans}} == {
        "data": twice,
        "prepare inputs": twice,
        "forward": twice,
        "backward": twice,
        "optimizer": steps,
        "evaluate": [2, 4],
        "checkpoint": [2, 4],
        "Time taken: Measured.training_step": twice,
    }
    for span in spans:
        inside = span.name in ("prepare inputs", "forward", "backward")
        assert around(span, spans) == ("Time taken: Measured.training_step" if inside else None)


def test_a_second_training_goes_on_and_an_error_lets_go(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = ObserverCallback(cluster.settings)
    trainer = tiny.trainer(tmp_path, [callback], max_steps=2)
    trainer.train()
    before = set(vars(trainer))
    fail = iter([False, True])

    def backward(*args: Any, **kwargs: Any) -> None:
        if next(fail):
            raise RuntimeError("out of memory")
        type(trainer.accelerator).backward(trainer.accelerator, *args, **kwargs)

    monkeypatch.setattr(trainer.accelerator, "backward", backward)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert vars(trainer.accelerator)["backward"] is backward, "what was there before us stays"
    assert set(vars(trainer)) == before
    finish(callback)
    spans = logged(cluster)
    assert steps_of(spans, "data") == [1, 2, 3, 4]
    assert steps_of(spans, "backward") == [1, 2, 3, 4], "also the one that failed"


def test_the_phases_of_grpo(cluster: Cluster, tmp_path: Path) -> None:
    callback = ObserverCallback(cluster.settings)
    trainer = rlhf.trainer("grpo", tmp_path, callbacks=[callback])
    trainer.train()
    finish(callback)
    spans = logged(cluster)
    assert {around(span, spans) for span in spans if span.name == "generation"} == {"prepare inputs"}
    assert {around(span, spans) for span in spans if span.name == "rewards"} == {"generation"}


def test_profiling_can_be_turned_off(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DEFAULT_PROFILING_CONFIG, "enabled", False)
    callback = ObserverCallback(cluster.settings)
    tiny.trainer(tmp_path, [callback], max_steps=1).train()
    finish(callback)
    assert logged(cluster) == []
