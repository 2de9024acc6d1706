"""How ranks reach the writer of their run, and who creates it."""

from __future__ import annotations

from typing import Any

import ray

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.messages import ACTOR_PREFIX, NAMESPACE
from swanlab_ray.actors.writer.actor import Writer

GROUPS = {"ingest": 1, "hello": 1, "goodbye": 32, "query": 2}
"""Threads for each group of the writer's calls: signs of life, which come with the batches, wait for no other call. The
goodbyes of a world wait together, for the same disk."""


def get_or_create(run_id: str, settings: ObserverSettings, life_lock: str | None = None) -> Any:
    """The handle of this run's writer; whichever rank comes first creates it."""
    actor_class = ray.remote(concurrency_groups=GROUPS)(Writer)
    return actor_class.options(
        name=f"{ACTOR_PREFIX}{run_id}",
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=0,
        **_where(),
    ).remote(run_id, settings, life_lock)


def import_there() -> Any:
    """Import the writer's class where it would run; the reference is to what that raises. Ray only restarts an actor
    whose class cannot be imported, without end and without saying so."""
    return ray.remote(max_retries=0)(_import).options(**_where()).remote()


def _import() -> None:
    pass


def _where() -> dict[str, Any]:
    # By name: else it would be put into the placement group of whoever creates it, and end with that.
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": "DEFAULT"}
    if "node:__internal_head__" in ray.cluster_resources():
        # On the head it dies only with the cluster itself; affinity to a node goes astray with num_cpus=0.
        options["resources"] = {"node:__internal_head__": 0.001}
    return options
