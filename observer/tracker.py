"""The tracker for Hugging Face Accelerate."""

from __future__ import annotations

from typing import Any

from accelerate.tracking import GeneralTracker

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.session import connect


class ObserverTracker(GeneralTracker):
    """``Accelerator(log_with=ObserverTracker(settings))``, on every rank.

    Accelerate calls trackers on the main process only, so ``accelerator.log`` is written as it is. Every rank is
    connected all the same, and logs its own values with ``tracker.observer.log({...}, step)``.

    Args:
        settings: see :class:`ObserverSettings`; by default read from the environment.
        overrides: fields of the settings, instead of ``settings``.
    """

    name = "swanlab-ray"
    requires_logging_directory = False

    def __init__(self, settings: ObserverSettings | None = None, **overrides: Any) -> None:
        super().__init__()
        self.observer: Observer = connect(settings, **overrides)
        if self.observer.rank != 0:
            # Accelerate never tells this rank that the training has ended; a clean exit means that it has.
            self.observer.result = ("success", None)

    @property
    def tracker(self) -> Observer:
        """What ``accelerator.get_tracker("swanlab-ray", unwrap=True)`` returns."""
        return self.observer

    def store_init_configuration(self, values: Any) -> None:
        """Record the configuration given to ``accelerator.init_trackers``."""
        self.observer.config(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log values of the whole job at a step."""
        self.observer.log_job(values, step)

    def finish(self) -> None:
        """End this rank's part (``accelerator.end_training()``)."""
        self.observer.finish()
