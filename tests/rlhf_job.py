"""Trains with each algorithm twice, without and with the observer, and writes down what came of it. For torchrun."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from swanlab_ray.observer import ObserverCallback, ObserverSettings, current
from tests import rlhf


def fingerprint(model: torch.nn.Module) -> str:
    """Of all weights, to the last bit."""
    digest = hashlib.sha256()
    for name, weights in sorted(model.state_dict().items()):
        digest.update(name.encode() + weights.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a trainer has logged, without what measures time."""
    measured = ("runtime", "per_second", "time")
    return [
        {name: value for name, value in logs.items() if not any(word in name for word in measured)} for logs in history
    ]


def main(output: Path) -> None:
    rank = int(os.environ["RANK"])
    settings = ObserverSettings(completion_log_interval=1)
    results: dict[str, Any] = {}
    offset = 0
    for algorithm in rlhf.ALGORITHMS:
        trained = []
        for callbacks in ([], [ObserverCallback(settings)]):
            trainer = rlhf.trainer(algorithm, tempfile.mkdtemp(), callbacks)
            trainer.train()
            trained.append(trainer)
        without, watched = trained
        results[algorithm] = {
            "offset": offset,
            "weights": [fingerprint(without.model), fingerprint(watched.model)],
            "logs": [timeless(without.state.log_history), timeless(watched.state.log_history)],
        }
        offset += watched.state.global_step
    observer = current()
    assert observer is not None
    assert observer.finish()
    (output / f"results-{rank}.json").write_text(json.dumps(results))
