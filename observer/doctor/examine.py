"""The order in which things are looked at."""

from __future__ import annotations

from collections.abc import Iterator

from swanlab_ray.actors.settings import ObserverSettings, SettingsError
from swanlab_ray.observer.doctor.cluster import examine_cluster
from swanlab_ray.observer.doctor.finding import Finding
from swanlab_ray.observer.doctor.machine import examine_disk, examine_ports
from swanlab_ray.observer.doctor.services import examine_cloud, examine_lark
from swanlab_ray.observer.doctor.trial import examine_trial
from swanlab_ray.observer.doctor.versions import examine_versions
from swanlab_ray.observer.job.identity import Identity, identify


def examine(lark: bool) -> Iterator[Finding]:
    """Look at this machine, and at the job if a launcher has started this as a rank of one; as it is found.

    Args:
        lark: send a test message to the bot.
    """
    try:
        settings, place = ObserverSettings(), identify()
    except SettingsError as error:
        yield Finding("wrong", "settings", str(error).rstrip("."))
        return
    if place.local_rank == 0:
        yield from _of_the_machine(settings, place, lark)
    yield from examine_trial(settings, place.world_size)


def _of_the_machine(settings: ObserverSettings, place: Identity, lark: bool) -> Iterator[Finding]:
    project = settings.project or "(none: pass project= or set SWANLAB_PROJ_NAME)"
    yield Finding("ok", "settings", f"project {project}, mode {settings.mode}, runs in {settings.log_dir}")
    yield from examine_versions()
    yield from examine_disk(settings.log_dir)
    yield examine_ports()
    yield examine_cloud(settings, first_machine=place.node == 0)
    bot = examine_lark(settings, lark and place.rank == 0)
    if bot is not None:
        yield bot
    yield from examine_cluster()
