"""Uploading a run from its journal: into one experiment, however often it is done."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from swanlab_ray.actors.cloud import CHUNK_SCALARS, CloudError, CloudExperiment, same
from swanlab_ray.actors.history import Damaged, RunFiles, ending, find_runs, merged, summarise
from swanlab_ray.actors.reduction import Reduction
from swanlab_ray.actors.settings import ObserverSettings, SettingsError
from swanlab_ray.actors.sink import Row
from swanlab_ray.actors.supersession import supersession
from swanlab_ray.actors.tables import Table

UNENDED = "the run has no end: its writer was killed, and nobody took over"


@dataclass(frozen=True, slots=True)
class Synced:
    """What an upload did, in scalars."""

    run_id: str
    url: str | None
    uploaded: int
    present: int
    """Were there already."""
    tables: int
    """Tables of completions that were uploaded."""
    damaged: int
    """Places in the files that could not be read; ``swanlab-ray verify`` tells more."""
    in_progress: bool
    """A writer is at work on the run, so its end was left to that."""


def sync(*paths: str | Path, progress: Callable[[int, int], None] | None = None, **settings: object) -> list[Synced]:
    """Upload runs to SwanLab's cloud from their journals, with the spools that lie beside them.

    What is there already is left as it is, so this may be interrupted, repeated and continued at will.

    Args:
        paths: log directories, run directories, or files; those of one run are put together by its run id.
        progress: called with the scalars that are done, and the events of the run.
        settings: fields of :class:`ObserverSettings` to use instead of those the run was made with, such as
            ``project``, ``workspace`` or ``api_key``.

    Raises:
        FileNotFoundError: a path does not exist, or there is no journal under it.
        CloudError: the cloud cannot be used; what was uploaded stays.
        SettingsError: a setting is wrong.
    """
    runs = find_runs([Path(path) for path in paths])
    if not runs:
        raise FileNotFoundError(f"No journal lies under {', '.join(repr(str(path)) for path in paths)}")
    return [_sync_run(run, progress, settings) for run in runs]


def _sync_run(run: RunFiles, progress: Callable[[int, int], None] | None, overrides: dict[str, object]) -> Synced:
    summary = summarise(run.paths)
    left_out = {"mode", "log_dir", "run_id"}
    if any(os.environ.get(name) for name in ("SWANLAB_API_HOST", "SWANLAB_WEB_HOST")):
        left_out |= {"api_host", "web_host"}  # the key of the environment is for these
    known = {name: value for name, value in run.header.settings.items() if name not in left_out}
    settings = ObserverSettings(**(known | overrides | {"mode": "cloud", "log_dir": run.paths[0].parent}))
    if not settings.project:
        raise SettingsError(
            f"The project of run '{run.run_id}' cannot be read from its journal: name it with --project."
        )
    experiment = CloudExperiment(settings, run.run_id)
    experiment.open()
    upload = _Upload(experiment, lambda done: progress(done, summary.events) if progress else None)
    damaged = 0
    try:
        reduction = Reduction(upload, settings, supersession(run))
        for entry in merged(run):
            if isinstance(entry, Damaged):
                damaged += not entry.damage.torn
            else:
                reduction.take(entry)
        in_progress = run.in_progress
        if not in_progress:
            reduction.flush()
        upload.flush()
        if not in_progress:
            experiment.finish(*(ending(summary) or ("crashed", UNENDED)))
        damaged += reduction.unread
    finally:
        experiment.close()
    return Synced(run.run_id, experiment.url, upload.uploaded, upload.present, upload.tables, damaged, in_progress)


class _Upload:
    """Sends the points that the experiment does not have."""

    def __init__(self, experiment: CloudExperiment, progress: Callable[[int], None]) -> None:
        self._experiment = experiment
        self._progress = progress
        self._rows: list[Row] = []
        self._scalars = 0
        self._config: dict[str, object] = {}
        self._exports = True
        self.uploaded = 0
        self.present = 0
        self.tables = 0

    def config(self, values: dict[str, object]) -> None:
        self._config |= values

    def write(self, step: int, time_ns: int, values: dict[str, float], table: Table | None = None) -> None:
        row = Row(step, time_ns, values, table)
        self._rows.append(row)
        self._scalars += row.weight
        if self._scalars >= CHUNK_SCALARS:
            self._send()

    def flush(self) -> None:
        self._send()
        if self._config:
            self._experiment.update_config(dict(self._config))

    def _send(self) -> None:
        known = self._known(sorted({key for row in self._rows for key in row.values}))
        missing = []
        for step, time_ns, values, table in self._rows:
            needed = {key: value for key, value in values.items() if not known(key, step, value)}
            wanted = table if step > self._experiment.highest_table else None
            self.tables += wanted is not None
            if needed or wanted:
                missing.append(Row(step, time_ns, needed, wanted))
                self.uploaded += len(needed)
            self.present += len(values) - len(needed)
        if missing:
            self._experiment.upload(missing)
        self._rows, self._scalars = [], 0
        self._progress(self.uploaded + self.present)

    def _known(self, keys: list[str]) -> Callable[[str, int, float], bool]:
        """Whether the experiment has a point. A server that cannot say has everything up to its highest step."""
        if self._exports:
            try:
                points = self._experiment.points(keys)
                return lambda key, step, value: same(points[key].get(step), value)
            except CloudError:
                self._exports = False
        return lambda key, step, value: step <= self._experiment.highest(key)
