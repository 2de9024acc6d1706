"""For Axolotl without a GPU: a plugin that lets it train with several processes, and what GRPO needs."""

from __future__ import annotations

import gc
import os
from typing import Any

from axolotl.integrations.base import BasePlugin


class CpuPlugin(BasePlugin):
    """Axolotl says ``use_gpu=True`` and ``cuda`` in places where nothing can be configured."""

    def register(self, cfg: dict[str, Any]) -> None:
        if "WORLD_SIZE" in os.environ:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        elif cfg.get("use_ray"):
            import ray.train

            class Scaling(ray.train.ScalingConfig):
                def __init__(self, **values: Any) -> None:
                    resources = {"CPU": 1} | (values.pop("resources_per_worker", None) or {})
                    resources.pop("GPU", None)
                    super().__init__(**values | {"use_gpu": False, "resources_per_worker": resources})

            ray.train.ScalingConfig = Scaling

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        cfg.device_map = {"": "cpu"}

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        if "WORLD_SIZE" in os.environ:
            return {"use_cpu": True, "ddp_backend": "gloo"}
        gc.freeze()  # what was imported: Axolotl collects garbage a dozen times, each time through all of it
        return {"use_cpu": True}


def length(completions: list[str], **_: Any) -> list[float]:
    """Reward: how long the completion is."""
    return [len(completion) / 10 for completion in completions]
