"""How busy this machine is: CPU, memory, disk and GPUs of one node, sampled by its first rank.

SwanLab's own monitor sees the writer's machine only, and is off.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import mean
from time import time_ns
from typing import Any

import psutil

from swanlab_ray.actors.wire.events import JOB, SCALARS
from swanlab_ray.observer.encoding.numbers import encode
from swanlab_ray.observer.script.notices import logger

SAMPLE_S = 5.0
"""Seconds between two samples; what is logged is their mean."""
SAMPLES = 1000
"""Samples of which the mean is taken at the most, should the step not move on."""


class NodeMetrics:
    """Logs ``node/<node>/...`` at the step under way, when that has moved on.

    ``cpu``, ``memory`` and ``disk`` are in percent; so are ``utilization`` and ``memory`` of each ``gpu/<index>``, its
    ``temperature`` is in degrees Celsius, its ``power`` in watts.

    Args:
        send: takes an encoded event; never blocks.
        step: the step under way; None while it is not known.
        node: index of this machine in the job.
        interval: seconds between two values.
        disk: the disk to look at is the one this path is on.
    """

    def __init__(
        self, send: Callable[[bytes], None], step: Callable[[], int | None], node: int, interval: float, disk: Path
    ) -> None:
        self._send = send
        self._step = step
        self._prefix = f"node/{node}"
        self._interval = interval
        self._path = disk
        self._stop = threading.Event()
        self._readings: dict[str, deque[float]] = {}
        self._last_step = -1
        try:
            threading.Thread(target=self._work, name="swanlab-ray-node", daemon=True).start()
        except RuntimeError as error:  # this process can have no more threads
            logger.warning("The load of this machine is not logged: %s", error)

    def stop(self) -> None:
        """Take no more samples."""
        self._stop.set()

    def _work(self) -> None:
        try:
            self._watch()
        except Exception as error:
            logger.warning("The load of this machine is not logged any more: %s", error)

    def _watch(self) -> None:
        gpus = _gpus()
        disk = next(place for place in (self._path.absolute(), *self._path.absolute().parents) if _is_there(place))
        psutil.cpu_percent()  # what it returns is the time since the last call
        pause = min(SAMPLE_S, self._interval)
        waited = 0.0
        while not self._stop.wait(pause):
            waited += pause
            self._add("cpu", psutil.cpu_percent())
            self._add("memory", psutil.virtual_memory().percent)
            self._add("disk", psutil.disk_usage(str(disk)).percent)
            for index, gpu in enumerate(gpus):
                self._sample_gpu(f"gpu/{index}", gpu)
            step = self._step()
            if waited >= self._interval and step is not None and step > self._last_step:
                waited, self._last_step = 0.0, step
                values = {name: mean(readings) for name, readings in self._readings.items()}
                self._readings = {}
                if self._stop.is_set():
                    return
                self._send(encode((SCALARS, step, time_ns(), JOB, values)))

    def _sample_gpu(self, name: str, gpu: Any) -> None:
        import pynvml

        readings: dict[str, Callable[[], float]] = {
            "utilization": lambda: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
            "memory": lambda: _percent(pynvml.nvmlDeviceGetMemoryInfo(gpu)),
            "temperature": lambda: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
            "power": lambda: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        }
        for what, read in readings.items():
            with suppress(pynvml.NVMLError):  # not every device tells everything
                self._add(f"{name}/{what}", read())

    def _add(self, name: str, value: float) -> None:
        self._readings.setdefault(f"{self._prefix}/{name}", deque(maxlen=SAMPLES)).append(value)


def _is_there(place: Path) -> bool:
    try:
        return place.exists()
    except OSError:  # not for this user to see
        return False


def _percent(memory: Any) -> float:
    return float(100 * memory.used / memory.total)


def _gpus() -> list[Any]:
    """Handles of this machine's NVIDIA GPUs; none where there is no driver or no nvidia-ml-py."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except Exception:
        return []
