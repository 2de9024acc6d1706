"""Observers of what is not observed: call sites need no ``if``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.events import State
from swanlab_ray.observer.encoding.numbers import Deferred
from swanlab_ray.observer.job.identity import (
    Identity,
)
from swanlab_ray.observer.observer import FINISH_TIMEOUT_S, Observer
from swanlab_ray.observer.script.notices import warn_once
from swanlab_ray.observer.timing.spans import NO_SPAN, NoSpan, Span, SpanLog
from swanlab_ray.observer.transport.tally import ChannelStatistics


class DisabledObserver(Observer):
    """Observes nothing: no thread, no actor, no file. Call sites need no ``if``."""

    def __init__(self, settings: ObserverSettings, identity: Identity) -> None:
        self.settings = settings
        self.rank, self.world_size, self.local_rank = identity.rank, identity.world_size, identity.local_rank
        self.in_ray_train = identity.in_ray_train
        self.outcome = None
        self.result = (None, None)
        self.trained_steps = 0
        self.tokenizers = set()
        self._finished = False
        self.spans = SpanLog(_ignore)
        self.spans.close()

    @property
    def run_id(self) -> str | None:
        return self.settings.run_id

    def log(self, data: Mapping[str, Any], step: SupportsIndex | None = None) -> None: ...

    def _log(self, data: Any, step: Any, scope: int) -> None: ...

    def log_completions(self, rows: Iterable[Mapping[str, Any]], step: SupportsIndex | None = None) -> None: ...

    def span(self, name: str) -> Span | NoSpan:
        return NO_SPAN

    def send(self, event: bytes | Deferred) -> None: ...

    def excuse(self, key: str, sentence: str) -> None: ...

    def config(self, /, values: Any = None, **more: Any) -> None: ...

    def progress(self, step: int, max_steps: int = 0, epoch: float | None = None) -> None: ...

    def set_result(self, state: State | None, error: str | None = None) -> None: ...

    def wait_ready(self, timeout: float) -> bool:
        return True

    def flush(self, timeout: float = 10.0) -> bool:
        return True

    def statistics(self) -> ChannelStatistics:
        return ChannelStatistics(0, 0, 0, {}, 0, 0)

    def finish(self, state: State = "success", error: str | None = None, timeout: float = FINISH_TIMEOUT_S) -> bool:
        self._on_finish(self)
        return True


class WorkerObserver(DisabledObserver):
    """Of a process that helps a rank: what it logs belongs to no rank."""

    def __init__(self, settings: ObserverSettings, identity: Identity, rank_pid: int) -> None:
        super().__init__(settings, identity)
        self._rank_pid = rank_pid

    def log(self, data: Mapping[str, Any], step: SupportsIndex | None = None) -> None:
        self._tell()

    def _log(self, data: Any, step: Any, scope: int) -> None:
        self._tell()

    def log_completions(self, rows: Iterable[Mapping[str, Any]], step: SupportsIndex | None = None) -> None:
        self._tell()

    def _tell(self) -> None:
        warn_once(
            "worker",
            f"This process was started by process {self._rank_pid}, a connected rank, so it counts as its worker and "
            "what it logs is not recorded: in a rank of its own call connect() after "
            "torch.distributed.init_process_group(), or set RANK and WORLD_SIZE.",
        )


def _ignore(event: object) -> None:
    """Takes the place of a channel."""
