"""The load of each machine, from one rank of it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swanlab_ray.observer.job.identity import Identity
from swanlab_ray.observer.observer import Observer
from tests.conftest import wait_until
from tests.incarnations import Cluster, Link, logged_in, mortal, settings_for


class NvmlError(Exception):
    """Stands in for ``pynvml.NVMLError``."""


def no_power(gpu: Any) -> int:
    raise NvmlError("not supported")


NVML = SimpleNamespace(
    NVMLError=NvmlError,
    NVML_TEMPERATURE_GPU=0,
    nvmlInit=lambda: None,
    nvmlDeviceGetCount=lambda: 2,
    nvmlDeviceGetHandleByIndex=lambda index: index,
    nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=50 + gpu),
    nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=20, total=80),
    nvmlDeviceGetTemperature=lambda gpu, sensor: 60,
    nvmlDeviceGetPowerUsage=no_power,
)


def test_one_rank_of_each_machine_logs_its_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mortal(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", NVML)
    cluster = Cluster(settings_for(tmp_path / "not" / "there", node_interval=0.02))
    places = [Identity(rank, 4, rank % 2, 2, node=rank // 2) for rank in range(4)]
    ranks = [Observer(cluster.settings, place, Link(cluster)) for place in places]
    assert all(observer.wait_ready(20) for observer in ranks)
    step = 0

    def logged() -> dict[str, dict[int, float]]:
        nonlocal step
        step += 1
        for observer in ranks:
            observer.step = step
        assert all(observer.flush(20) for observer in ranks)
        found: dict[str, dict[int, float]] = {}
        for _, at, values in logged_in(cluster.files):
            for name, value in values.items():
                if name.startswith("node/"):
                    assert at not in found.setdefault(name, {}), "one value for each step"
                    found[name][at] = value
        return found

    wait_until(lambda: {len(logged().get(f"node/{node}/cpu", {})) > 1 for node in (0, 1)} == {True}, 30, "two values")
    found = logged()
    for observer in ranks:
        assert observer.finish()
    of_gpus = {f"gpu/{gpu}/{what}" for gpu in (0, 1) for what in ("utilization", "memory", "temperature")}
    assert set(found) == {f"node/{node}/{what}" for node in (0, 1) for what in {"cpu", "memory", "disk", *of_gpus}}
    assert set(found["node/1/gpu/1/utilization"].values()) == {51.0}
    assert set(found["node/0/gpu/0/memory"].values()) == {25.0}
    assert all(0 <= value <= 100 for values in found.values() for value in values.values())
