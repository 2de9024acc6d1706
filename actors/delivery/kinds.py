"""Which kind of sink a run's mode asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from swanlab_ray.actors.delivery.cloud import CloudRun
from swanlab_ray.actors.delivery.disk import SwanLabRun
from swanlab_ray.actors.delivery.notes import DeliveryNotes
from swanlab_ray.actors.delivery.sink import Sink
from swanlab_ray.actors.settings import ObserverSettings


def make_sink(
    run_id: str, settings: ObserverSettings, directory: Path, notes: DeliveryNotes, notice: Callable[[str], None]
) -> Sink:
    """The sink of a run; it opens SwanLab's when it is started.

    Args:
        run_id: also the id of the SwanLab run.
        settings: of the run.
        directory: where its journal lies, for the sentence that says how to upload it.
        notes: what was delivered already; is told of more.
        notice: takes a sentence for the user.
    """
    if settings.mode == "cloud":
        return CloudRun(settings, run_id, notes.rows, str(directory), notes.delivered, notice, notes.opened)
    return SwanLabRun(settings, run_id, list(notes.run_dirs), notice, notes.opened)
