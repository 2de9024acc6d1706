"""Which way a rank's words take: through the Ray that its process has initialised, or through the machine's agent."""

from __future__ import annotations

import math
from typing import Any

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.messages import Ack, Farewell, Goodbye, Hello, NumberedBatch, Sign
from swanlab_ray.actors.wire.status import WriterStatus
from swanlab_ray.observer.agent.link import AgentLink
from swanlab_ray.observer.agent.meeting import Meeting
from swanlab_ray.observer.job.identity import Identity, resolve_run_id
from swanlab_ray.observer.ray_cluster import own
from swanlab_ray.observer.ray_cluster.addresses import NoCluster
from swanlab_ray.observer.ray_cluster.link import Connection, RayLink
from swanlab_ray.observer.transport.link import Link, LinkBroken, brief


class RankLink:
    """Chooses one whenever it is opened: the script's Ray may come and go."""

    def __init__(self, settings: ObserverSettings, identity: Identity) -> None:
        self._settings = settings
        self._identity = identity
        self._link: Link | None = None
        self._deadline = math.inf
        self.run_id: str | None = settings.run_id

    @property
    def deadline(self) -> float:
        return self._deadline

    @deadline.setter
    def deadline(self, deadline: float) -> None:
        self._deadline = deadline
        if self._link is not None:
            self._link.deadline = deadline

    def open(self, hello: Hello) -> Ack:
        try:
            return self._open(hello)
        except LinkBroken:
            raise
        except Exception as error:  # stores, Ray and sockets raise many kinds; each means the same here
            raise LinkBroken(brief(error)) from error

    def _open(self, hello: Hello) -> Ack:
        # Ray Train tells its run only after Ray is imported; otherwise the id is there before Ray is.
        if self.run_id is None:
            self.run_id = resolve_run_id(self._settings, self._identity)
        has_own = own.connection(self._identity.world_size) is not None
        link = self._link
        if link is None or isinstance(link, RayLink) is not has_own:
            self.close(False)
            link = self._link = self._through_own(self.run_id) if has_own else self._through_agent(self.run_id)
            link.deadline = self._deadline
        return link.open(hello)

    def _through_agent(self, run_id: str) -> Link:
        return AgentLink(self._settings, run_id, Meeting(self._identity, run_id))

    def _through_own(self, run_id: str) -> Link:
        def connect() -> Connection:
            connection = own.connection(self._identity.world_size)
            if connection is None:
                raise NoCluster("The script has left Ray.")
            return connection

        return RayLink(self._settings, run_id, connect)

    def _opened(self) -> Link:
        if self._link is None:
            raise LinkBroken("not connected")
        return self._link

    def ingest(self, sign: Sign, batch: NumberedBatch | None) -> Any:
        return self._opened().ingest(sign, batch)

    def acknowledged(self, reference: Any, wait: float) -> Ack | None:
        return self._opened().acknowledged(reference, wait)

    def goodbye(self, goodbye: Goodbye, wait: float) -> Farewell:
        return self._opened().goodbye(goodbye, wait)

    def status(self, wait: float) -> WriterStatus | None:
        return self._opened().status(wait)

    def close(self, over: bool) -> None:
        if self._link is not None:
            self._link.close(over)
            self._link = None
