"""Warns of several experiment trackers in one training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swanlab_ray.observer.script.notices import logger

OTHERS = {
    "WandB": ("use_wandb", "wandb_project"),
    "MLflow": ("use_mlflow", "mlflow_experiment_name"),
    "Comet": ("use_comet", "comet_project_name"),
    "Trackio": ("use_trackio", "trackio_project_name"),
    "TensorBoard": ("use_tensorboard",),
    "OpenTelemetry": ("use_otel_metrics",),
}
"""Axolotl's other trackers, and the keys any of which turns one on."""
OVERHEAD_PERCENT = 1.5
"""Of a training step, for each tracker that logs on the training thread: 1 to 2 are what their users report."""


def enabled(cfg: Mapping[str, Any]) -> list[str]:
    """The other trackers that this configuration turns on."""
    return [name for name, keys in OTHERS.items() if any(cfg.get(key) for key in keys)]


def warn_of_several(cfg: Mapping[str, Any]) -> None:
    """Say once what several trackers cost: a warning for two, an error for three and more. The training goes on."""
    names = ["SwanLab", *enabled(cfg)]
    if len(names) < 2:
        return
    overhead = f"Expected overhead: ~{OVERHEAD_PERCENT * len(names):.1f}% per training step."
    if len(names) == 2:
        logger.warning(
            f"Multiple logging tools enabled: {', '.join(names)}. {overhead} Choose one for production training; "
            "several are fine for a migration or a short comparison."
        )
    else:
        logger.error(
            f"{len(names)} logging tools enabled simultaneously! {', '.join(names)}. {overhead} "
            "STRONGLY RECOMMEND: Disable all but ONE logging tool."
        )
