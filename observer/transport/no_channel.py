"""The channel of an observer in a forked child, where the flusher does not exist and any lock may be held for ever."""

from __future__ import annotations

from threading import Event

from swanlab_ray.observer.transport.channel import Channel, ChannelStatistics


class NoChannel(Channel):
    """Takes nothing, and waits for nothing: the run is the parent's."""

    def __init__(self) -> None:
        self.last_error = "this is a forked child: call connect() in it"
        self.ready = Event()

    def put(self, event: object) -> None: ...

    def put_late(self, event: object) -> None: ...

    def refuse(self) -> None: ...

    def flush(self, timeout: float) -> bool:
        return True

    def statistics(self) -> ChannelStatistics:
        return ChannelStatistics(0, 0, 0, {}, 0, 0)
