"""A training step of the demo with and without the observer, and the time spent inside the callback.

Run it with: python -m tests.benchmarks.bench_step
Blocks of steps with and without the callback alternate in one process on one model. The time inside the callback is
summed by a timer around its methods, so that it does not drown in the noise of the steps.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from typing import Any

BLOCKS = 12
STEPS = 10
REAL_STEP_S = 0.2


def main() -> None:
    os.environ.update(RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    from transformers import Trainer, TrainingArguments

    from swanlab_ray.observer import ObserverCallback, ObserverSettings, connect
    from swanlab_ray.observer.demo.training import PythonSource, small_llama

    directory = tempfile.mkdtemp()
    settings = ObserverSettings(project="bench", mode="offline", log_dir=directory)
    observer = connect(settings)
    assert observer.wait_ready(120)
    inside: list[float] = []
    model = small_llama()
    medians: dict[bool, list[float]] = {False: [], True: []}
    for block in range(2 * BLOCKS):
        observed = block % 2 == 1
        args = TrainingArguments(
            output_dir=directory, max_steps=STEPS, per_device_train_batch_size=16, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        callback = ObserverCallback(settings)
        times: list[float] = []
        trainer = Trainer(model, args, train_dataset=PythonSource(), callbacks=[callback] if observed else [])
        trainer.add_callback(_clock(times))
        _time_methods(callback, inside)
        trainer.train()
        medians[observed].append(statistics.median(times[1:]))
    without, with_observer = (statistics.median(medians[observed]) for observed in (False, True))
    spread = statistics.stdev(medians[False])
    steps = BLOCKS * STEPS
    per_step = sum(inside) / steps
    print(f"step without {without * 1e3:.1f} ms, with {with_observer * 1e3:.1f} ms, spread {spread * 1e3:.1f} ms")
    print(f"inside the callback {per_step * 1e6:.0f} us a step: {per_step / REAL_STEP_S:.3%} of a 200 ms step")
    observer.finish()


def _clock(times: list[float]) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.last = 0.0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            if self.last:
                times.append(now - self.last)
            self.last = now

    return Clock()


def _time_methods(callback: Any, inside: list[float]) -> None:
    for name in ("on_step_end", "on_log", "_add_loss"):
        method = getattr(callback, name)

        def timed(*args: Any, _method: Any = method, **kwargs: Any) -> None:
            began = time.perf_counter()
            _method(*args, **kwargs)
            inside.append(time.perf_counter() - began)

        setattr(callback, name, timed)


if __name__ == "__main__":
    main()
