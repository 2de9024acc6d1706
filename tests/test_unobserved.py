"""Whatever is called on an observer that observes nothing: it neither raises nor waits, says or keeps anything."""

from __future__ import annotations

import inspect
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.observer.encoding.numbers import encode
from swanlab_ray.observer.job.identity import Identity
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.script.never_raises import never_raises, records
from swanlab_ray.observer.transport.channel import Channel, NoChannel
from swanlab_ray.observer.unobserved import DisabledObserver, WorkerObserver

PUBLIC = sorted(name for name in dir(Observer) if not name.startswith("_"))
RIGHT: dict[str, Any] = {
    "data": {"x": 1.0},
    "step": 3,
    "rows": [{"prompt": "p", "completion": "c"}],
    "values": {"lr": 1e-4},
    "more": {"seed": 1},
    "name": "forward",
    "event": encode((1, 2)),
    "max_steps": 9,
    "epoch": 0.5,
    "state": "success",
    "error": "ValueError: boom",
    "timeout": 30.0,
    "key": "key",
    "sentence": "A sentence.",
}
"""A value for each parameter, by its name."""


class Hostile:
    """Raises whatever is done with it."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    __index__ = __float__ = __str__ = __repr__ = __iter__ = __bool__ = lambda self: 1 / 0  # type: ignore[assignment]


def call_everything(observer: Observer, value: Callable[[str], Any]) -> dict[str, Any]:
    """Go through all that is public; what each returned."""
    returned: dict[str, Any] = {}
    for name in PUBLIC:
        static = inspect.getattr_static(Observer, name)
        if isinstance(static, property):
            returned[name] = getattr(observer, name)
            if static.fset is not None:
                setattr(observer, name, value(name))
            continue
        method = getattr(observer, name)
        parameters = list(inspect.signature(static).parameters.values())[1:]
        keywords = {p.name: value(p.name) for p in parameters if p.kind is not p.VAR_KEYWORD}
        returned[name] = method(**keywords) if name != "config" else method(value("values"), more=value("more"))
        if name == "span":
            with returned[name]:
                pass
    with observer as same:
        assert same is observer
    repr(observer)
    return returned


def unobserved(kind: str, log_dir: Path, **settings: Any) -> Observer:
    given = ObserverSettings(project="p", mode="offline", log_dir=log_dir / "logs", run_id="r", **settings)
    if kind == "disabled":
        return DisabledObserver(given, Identity(0, 1, 0, 1))
    return WorkerObserver(given, Identity(0, 1, 0, 1), os.getpid())


@pytest.mark.parametrize("kind", ["disabled", "worker"])
def test_every_method_works_on_an_observer_that_observes_nothing(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    threads = set(threading.enumerate())
    began = time.monotonic()
    observer = unobserved(kind, tmp_path)
    returned = call_everything(observer, RIGHT.__getitem__)
    assert time.monotonic() - began < 10
    assert set(threading.enumerate()) == threads
    assert list(tmp_path.iterdir()) == []
    assert {name for name, value in returned.items() if value is not None} == (
        {"finish", "finished", "flush", "run_id", "span", "statistics", "wait_ready"}
    )
    assert (returned["finish"], returned["flush"], returned["wait_ready"], returned["run_id"]) == (
        True,
        True,
        True,
        "r",
    )
    assert (returned["statistics"].logged, observer.step, observer.result) == (0, 3, (None, None))
    said = [record.getMessage() for record in caplog.records]
    assert [sentence for sentence in said if "counts as its worker" not in sentence] == []
    assert len(said) == (1 if kind == "worker" else 0)


@pytest.mark.parametrize("kind", ["disabled", "worker"])
@pytest.mark.parametrize("strict", [False, True])
def test_nothing_that_is_passed_to_it_is_looked_at(
    kind: str, strict: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Reading it could take long, as from a GPU; and strict=True is for who is observed."""
    observer = unobserved(kind, tmp_path, strict=strict)
    call_everything(observer, lambda name: Hostile())
    assert [record for record in caplog.records if "counts as its worker" not in record.getMessage()] == []


@pytest.mark.parametrize("guard", [records, never_raises(None), lambda method: method])
def test_a_method_that_somebody_adds_works_there_by_itself(
    guard: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log_audio(self: Observer, name: str) -> None:
        self._put(encode((99, name)))
        self.excuse("audio", "There is no audio here.")

    monkeypatch.setattr(Observer, "log_audio", guard(log_audio), raising=False)
    for kind in ("disabled", "worker"):
        observer: Any = unobserved(kind, tmp_path)
        observer.log_audio("bell")
        assert observer.statistics().logged == 0


def test_every_method_works_in_a_forked_child(observer: Observer) -> None:
    assert observer.wait_ready(10)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        code = 1
        try:
            observer._forked()
            returned = call_everything(observer, RIGHT.__getitem__)
            call_everything(observer, lambda name: Hostile())
            code = 0 if returned["statistics"].logged == 0 and returned["finish"] else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_channel_that_takes_nothing_has_all_that_a_channel_has() -> None:
    """It has none of the parts, so what it does not define itself would fail."""
    public = {name for name in vars(Channel) if not name.startswith("_")}
    assert public <= vars(NoChannel).keys()
    assert {name for name in vars(NoChannel(None)) if not name.startswith("_")} >= {"done", "queue", "ready"}
