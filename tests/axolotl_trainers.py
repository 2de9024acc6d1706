"""Trainers of one's own for Axolotl, as ``trainer_cls`` names them."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers.base import AxolotlTrainer

from swanlab_ray.observer.profiling import swanlab_profile


class ProfiledTrainer(AxolotlTrainer):
    @swanlab_profile
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs)


class CrashingTrainer(AxolotlTrainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise RuntimeError("boom")
        return super().training_step(*args, **kwargs)
