"""The order in which things are looked at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from swanlab_ray.actors.settings import ObserverSettings, SettingsError
from swanlab_ray.observer.doctor.cluster import examine_cluster
from swanlab_ray.observer.doctor.finding import Finding, phrase
from swanlab_ray.observer.doctor.machine import examine_disk, examine_ports
from swanlab_ray.observer.doctor.services import examine_cloud, examine_lark
from swanlab_ray.observer.doctor.trial import examine_trial
from swanlab_ray.observer.doctor.versions import examine_versions
from swanlab_ray.observer.job.identity import Identity, identify, shared_store


def examine(lark: bool) -> Iterator[Finding]:
    """Look at this machine, and at the job if a launcher has started this as a rank of one; as it is found.

    Args:
        lark: send a test message to the bot.
    """
    try:
        settings, place = ObserverSettings(), identify()
    except SettingsError as error:
        yield Finding("wrong", "settings", phrase(error))
        yield from _guarded("versions", examine_versions)
        return
    if place.local_rank == 0:
        for about, look in _of_the_machine(settings, place, lark).items():
            for found in _guarded(about, look):
                yield found
                if (found.state, found.about) == ("wrong", "log_dir"):
                    return  # where the trial run would lie
    yield from _guarded("trial run", partial(_of_the_job, settings, place))


def _of_the_machine(
    settings: ObserverSettings, place: Identity, lark: bool
) -> dict[str, Callable[[], Iterable[Finding]]]:
    return {
        "ports": examine_ports,  # first: later the agent of this machine's ranks listens at one
        "settings": lambda: [_of_settings(settings)],
        "versions": examine_versions,
        "SwanLab": lambda: examine_cloud(settings, first_machine=place.node == 0),
        "Lark": partial(examine_lark, settings, lark and place.rank == 0),
        "Ray": examine_cluster,
        "log_dir": lambda: examine_disk(settings.log_dir),
    }


def _of_the_job(settings: ObserverSettings, place: Identity) -> Iterator[Finding]:
    if place.nodes > 1 and not os.environ.get("RAY_ADDRESS") and shared_store() is None:
        told = "its machines could not find each other: start the doctor by torchrun, or set RAY_ADDRESS"
        yield Finding("note", "trial run", f"none was made, since {told}")
        return
    yield from examine_trial(settings, place.world_size)


def _guarded(about: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What stops one look does not stop the others. Its text may hold a secret."""
    try:
        yield from look()
    except Exception as error:
        yield Finding("wrong", about, f"it cannot be looked at ({type(error).__name__}): check the variables for it")


def _of_settings(settings: ObserverSettings) -> Finding:
    project = settings.project or "(none: pass project= or set SWANLAB_PROJ_NAME)"
    told = f"project {project}, mode {settings.mode}, runs in {settings.log_dir}"
    if settings.mode == "disabled" or ("use_swanlab" in settings.model_fields_set and not settings.use_swanlab):
        return Finding("note", "settings", f"{told}; nothing is observed, by SWANLAB_MODE or USE_SWANLAB")
    return Finding("ok", "settings", told)
