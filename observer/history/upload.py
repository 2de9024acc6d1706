"""Uploading a run from its journal: into one experiment, however often it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from swanlab_ray.actors.completions.tables import Table, safe
from swanlab_ray.actors.delivery.refusals import Delivery
from swanlab_ray.actors.delivery.sink import SCALAR_BYTES, Row
from swanlab_ray.actors.journal.reading import Damaged
from swanlab_ray.actors.reduction.reduction import Reduction
from swanlab_ray.actors.reduction.supersession import supersession
from swanlab_ray.actors.runs.at_work import AtWork
from swanlab_ray.actors.runs.finding import RunFiles, find_runs
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.actors.runs.summary import Summary, ending, summarise
from swanlab_ray.actors.settings import ObserverSettings, SettingsError
from swanlab_ray.actors.swanlab.experiment import CHUNK_SCALARS, CloudError, CloudExperiment, Point, same
from swanlab_ray.actors.swanlab.limits import HIGHEST_STEP, Limits, fit_time
from swanlab_ray.actors.swanlab.login import find_account, same_host

OF_THE_RUN = (
    "project",
    "workspace",
    "experiment_name",
    "description",
    "rank_series",
    "completion_log_interval",
    "completion_max_buffer",
    "completion_max_chars",
)
"""Settings of a journal that an upload goes by."""
UNENDED = "the run has no end: its writer was killed, and nobody took over"
UNTAKEN = "the run has no journal here: only what its ranks had put aside"


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
    withheld: int
    """Scalars that SwanLab does not take."""
    notices: tuple[str, ...]
    """What it does not take, a sentence for each name; what is missing, and who is at work."""
    in_progress: bool
    """Somebody is at work on the run, so its end was left to that."""


def sync(
    *paths: str | Path, progress: Callable[[int, int], None] | None = None, force: bool = False, **settings: object
) -> list[Synced]:
    """Upload runs to SwanLab's cloud from their journals, with the spools that lie beside them.

    What is there already is left as it is, so this may be interrupted, repeated and continued at will.

    Args:
        paths: log directories, run directories, or files; those of one run are put together by its run id.
        progress: called with the scalars that are done, and the events of the run.
        force: end a run though somebody seems to be at work on it.
        settings: fields of :class:`ObserverSettings` to use instead of those the run was made with, such as
            ``project``, ``workspace``, ``api_key`` or ``api_host``. The key goes to this host, that of the environment,
            that of ``swanlab login``, or SwanLab's own; never to one that only a journal names.

    Raises:
        FileNotFoundError: a path does not exist, or there is no journal under it.
        CloudError: the cloud cannot be used; what was uploaded stays.
        SettingsError: a setting is wrong.
    """
    return [sync_run(run, progress, force, settings) for run in runs_under([Path(path) for path in paths])]


def runs_under(paths: list[Path]) -> list[RunFiles]:
    """The runs that lie there.

    Raises:
        FileNotFoundError: there is none.
    """
    runs = find_runs(paths)
    if not runs:
        raise FileNotFoundError(f"No journal lies under {', '.join(repr(str(path)) for path in paths)}")
    return runs


def sync_run(
    run: RunFiles, progress: Callable[[int, int], None] | None, force: bool, overrides: dict[str, object]
) -> Synced:
    """Upload one run; see :func:`sync`."""
    summary = summarise(run.paths)
    settings = _settings(run, overrides)
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
        worker = None if force else run.at_work
        if worker is None:
            reduction.flush()
        upload.flush()
        if worker is None:
            experiment.finish(*(ending(summary) or ("crashed", UNENDED if run.journals else UNTAKEN)))
        damaged += reduction.unread
    finally:
        experiment.close()
    return Synced(
        run.run_id,
        experiment.url,
        upload.uploaded,
        upload.present,
        upload.tables,
        damaged,
        upload.withheld,
        (*upload.notices, *_to_know(run, summary, worker)),
        worker is not None,
    )


def _to_know(run: RunFiles, summary: Summary, worker: AtWork | None) -> Iterator[str]:
    if worker is not None:
        yield f"The run's end is left to who writes it, {worker}; --force ends it here."
    absent = summary.world_size - len(summary.ranks())
    if not run.journals and absent > 0:
        yield f"Of {summary.world_size} ranks {absent} are missing: give the paths of their files and journal as well."
    if not run.journals and any(life.missing for life in summary.lives.values()):
        yield "What the ranks had sent before is missing: give the path of the run's journal as well."


def _settings(run: RunFiles, overrides: dict[str, object]) -> ObserverSettings:
    """The run's settings, as far as they say what is uploaded. Its journal may come from anywhere, so where it goes and
    with which key is said by the caller and this machine.
    """
    told = run.header.settings
    known = {name: told[name] for name in OF_THE_RUN if name in told and _is_valid(name, told[name])}
    ours: dict[str, object] = {"mode": "cloud", "log_dir": run.paths[0].parent, "run_id": None}
    settings = ObserverSettings(**(known | overrides | ours))
    if not settings.project:
        raise SettingsError(
            f"The project of run '{run.run_id}' cannot be read from its journal: name it with --project."
        )
    before = told.get("api_host") or told.get("web_host")
    if before and settings.api_host is None and settings.web_host is None:
        here = find_account(settings).api_host
        if not same_host(str(before), here):
            raise SettingsError(
                f"Run '{run.run_id}' was in the cloud at {safe(str(before))!r:.200}, and the API key of this machine "
                f"is for {here}: say with --host which of them gets the run, and the key."
            )
    return settings


def _is_valid(name: str, value: object) -> bool:
    """Whether a setting that a journal tells of, of another version perhaps, is one here."""
    try:
        ObserverSettings(**{name: value, "run_id": None})
    except SettingsError:
        return False
    return True


class _Upload:
    """Sends the points that the experiment does not have."""

    def __init__(self, experiment: CloudExperiment, progress: Callable[[int], None]) -> None:
        self._experiment = experiment
        self._limits = Limits(self._tell)
        self._delivery = Delivery(experiment, self._limits, self._tell)
        self._progress = progress
        self._rows: list[Row] = []
        self._bytes = 0
        self._config: dict[str, object] = {}
        self._exports = True
        self.uploaded = 0
        self.present = 0
        self.tables = 0
        self.withheld = 0
        self.notices: list[str] = []

    def _tell(self, sentence: str) -> None:
        self.notices.append(sentence)

    def config(self, values: dict[str, object]) -> None:
        self._config |= values

    def write(self, step: int, time_ns: int, values: dict[str, float], table: Table | None = None) -> None:
        fitted = self._limits.fit(step, values)
        self.withheld += len(values) - len(fitted)
        row = Row(step, fit_time(time_ns), fitted, table if step <= HIGHEST_STEP else None)
        self._rows.append(row)
        self._bytes += row.size
        if self._bytes >= SCALAR_BYTES * CHUNK_SCALARS:
            self._send()

    def flush(self) -> None:
        self._send()
        if self._config:
            self._delivery.config(dict(self._config))

    def _send(self) -> None:
        known = self._known(sorted({key for row in self._rows for key in row.values}))
        missing = []
        for step, time_ns, values, table in self._rows:
            needed = {key: value for key, value in values.items() if not known(key, step, value)}
            if self._exports and (present := values.keys() - needed.keys()):
                key = min(present)
                self._delivery.known_point = Point(key, step, time_ns, values[key])
            wanted = table if step > self._experiment.highest_table else None
            self.tables += wanted is not None
            if needed or wanted:
                missing.append(Row(step, time_ns, needed, wanted))
                self.uploaded += len(needed)
            self.present += len(values) - len(needed)
        if missing:
            withheld = self._delivery.deliver(missing).scalars
            self.withheld += withheld
            self.uploaded -= withheld
        self._rows, self._bytes = [], 0
        self._progress(self.uploaded + self.present)

    def _known(self, keys: list[str]) -> Callable[[str, int, float], bool]:
        """Whether the experiment has a point. A server that cannot say has everything up to its highest step."""
        if self._exports:
            try:
                points = self._experiment.points(keys)
                return lambda key, step, value: same(points[key].get(step), value)
            except CloudError as error:
                self._exports = False
                self._tell(f"Of each series only what lies beyond its highest step is uploaded: {error}.")
        return lambda key, step, value: step <= self._experiment.highest(key)
