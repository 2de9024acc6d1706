"""Observers of what is not observed: call sites need no ``if``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, SupportsIndex

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.observer.job.identity import Identity
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.script.notices import warn_once
from swanlab_ray.observer.timing.spans import NO_SPAN, NoSpan, Span
from swanlab_ray.observer.transport.channel import NoChannel


class DisabledObserver(Observer):
    """Observes nothing: an observer over a channel that takes nothing. No thread, no actor, no file."""

    def __init__(self, settings: ObserverSettings, identity: Identity) -> None:
        self._describe(settings, identity)
        self._report_through(NoChannel(settings.run_id))
        self.spans.close()

    # What a training calls most: without a look at what is passed.

    def log(self, data: Mapping[str, Any], step: SupportsIndex | None = None) -> None: ...

    def span(self, name: str) -> Span | NoSpan:
        return NO_SPAN


class WorkerObserver(DisabledObserver):
    """Of a process that helps a rank: what it logs belongs to no rank."""

    def __init__(self, settings: ObserverSettings, identity: Identity, rank_pid: int) -> None:
        super().__init__(settings, identity)
        self._rank_pid = rank_pid

    def _tell(self, *args: Any, **kwargs: Any) -> None:
        warn_once(
            "worker",
            f"This process was started by process {self._rank_pid}, a connected rank, so it counts as its worker and "
            "what it logs is not recorded: in a rank of its own call connect() after "
            "torch.distributed.init_process_group(), or set RANK and WORLD_SIZE.",
        )

    log = _log = log_completions = _tell
