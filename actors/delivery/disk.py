"""A SwanLab run on disk, for the local dashboard or kept offline.

SwanLab cannot reopen such a run. So a writer that was restarted, or a training that goes on under the same run id,
writes a new one from the journal's beginning, and removes the incomplete ones when that is closed.
"""

from __future__ import annotations

import math
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from swanlab_ray.actors.completions.buffers import TABLE
from swanlab_ray.actors.completions.tables import as_charts, as_texts
from swanlab_ray.actors.delivery.sink import FINISH_DEADLINE_S, SCALAR_BYTES, Row, Sink, Stopped
from swanlab_ray.actors.delivery.thinning import SERIES, Beginnings, Thinning
from swanlab_ray.actors.settings import ObserverSettings, tidy_environment
from swanlab_ray.actors.swanlab import sdk
from swanlab_ray.actors.swanlab.limits import fit_config
from swanlab_ray.actors.wire.events import State
from swanlab_ray.actors.wire.text import brief, many

OPEN_RETRY_S = (1.0, 30.0)
"""First and longest pause between two attempts to open SwanLab's run."""
CALL_SCALARS = {"local": 25, "offline": 100}
"""Given to SwanLab at once."""
AHEAD_CALLS = {"local": 4, "offline": 1000}
"""Calls that may wait in SwanLab's own queue: a few seconds of what it writes."""
BATCH_SCALARS = 100
"""SwanLab writes so many together."""
CLOSING_S = 3.0
"""Beside what is under way."""
LOCAL_LAG_S = 30.0
"""What its local dashboard could not take in this time is thinned."""
LOCAL_WAITING = 2000
"""Scalars that may always wait."""


class SwanLabRun(Sink):
    """Writes rows with SwanLab's own SDK.

    Args:
        settings: mode ``local`` or ``offline``.
        run_id: identity of the run.
        replaced: directories of incomplete runs that this one takes the place of.
        notice, on_open: see :class:`Sink`.
    """

    def __init__(
        self,
        settings: ObserverSettings,
        run_id: str,
        replaced: list[str],
        notice: Callable[[str], None],
        on_open: Callable[[Sink], None],
    ) -> None:
        self._settings = settings
        self._run_id = run_id
        self._replaced = replaced
        self._run: Any = None
        self._handed = 0  # scalars that SwanLab was given
        self._restarted = self._told = False
        self._pace = _Pace()
        self._thinning = Thinning(self._lose)
        self._beginnings = Beginnings(self._lose)
        self.waits = settings.mode != "local"  # the local dashboard is for looking at now, and takes little
        super().__init__(settings.mode, notice, on_open)

    def _open(self) -> None:
        tidy_environment()
        pause, told = OPEN_RETRY_S[0], False
        while self._run is None:
            try:
                self._open_once()
            except Exception as error:
                if self._end is not None or self._stopped:
                    raise
                if not told:
                    told = True
                    self.notice(f"SwanLab's run cannot be opened ({brief(error)}); it is tried again until the end.")
                self._wake.wait(pause)
                pause = min(2 * pause, OPEN_RETRY_S[1])

    def _open_once(self) -> None:
        import swanlab

        try:
            self._settings.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"log_dir '{self._settings.log_dir}' cannot be made on the writer's machine ({error.strerror}); "
                "choose another with log_dir= or SWANLAB_LOG_DIR"
            ) from None
        directory = self._new_directory()
        self.run_dir = str(directory)
        self._on_open(self)  # before it is there: whoever takes over finds it, whenever this writer is killed
        try:
            self._run = swanlab.init(settings=self._swanlab_settings(directory.name))
            sdk.count_stored(self._run, self._stored)
        except BaseException:
            self.run_dir = None
            remove_run(directory, self._settings.log_dir, self._run_id)
            raise

    def _new_directory(self) -> Path:
        """Named as SwanLab names them, but known beforehand; none that this run will take the place of."""
        run = re.sub(r"\W+", "_", self._run_id, flags=re.ASCII)[:200].strip("_") or "run"
        while True:
            directory = self._settings.log_dir / f"run-{datetime.now():%Y%m%d_%H%M%S}-{run}"
            if not directory.exists() and str(directory) not in self._replaced:
                return directory
            time.sleep(0.1)

    def _swanlab_settings(self, directory: str) -> Any:
        from swanlab import Settings

        ours = self._settings
        return Settings(
            mode=self.mode,
            log_dir=Path(ours.log_dir),
            interactive=False,
            project=Settings.Project(name=ours.project),  # the workspace is the cloud's
            experiment=Settings.Experiment(name=ours.experiment_name or self._run_id, description=ours.description),
            run=Settings.Run(id=self._run_id, resume="allow", dir=directory),
            # The monitor thread writes into the run file without a lock and damages it; it would also describe the
            # writer's machine, not the machines that train.
            probe=Settings.Probe(monitor=False, hardware=False, runtime=False, requirements=False, git=False),
            terminal=Settings.Terminal(proxy_type="none"),
        )

    def _update_config(self, values: dict[str, Any]) -> None:
        self._run.config.update(fit_config(values))

    @property
    def _patient(self) -> bool:
        return self.waits and not (self.mode == "local" and self._drain_until < math.inf)

    def _queue(self, row: Row) -> None:
        if self.mode != "local" or self._patient:
            super()._queue(row)
            return
        begun = self._beginnings.keep(row)
        if begun is not row:
            self._tell_of_thinning()
            row = begun
        scalars = max(LOCAL_WAITING, int(self._pace.rate() * LOCAL_LAG_S))
        bound = max(2 * row.size, SCALAR_BYTES * scalars)
        if self._waiting < bound / 4:
            self._thinning.relax()
        row = self._thinning.keep(row)
        self._rows.append(row)
        self._waiting += row.size
        if self._waiting > bound:
            self._waiting = self._thinning.thin(self._rows, self._waiting, bound)
            self._tell_of_thinning()

    def _tell_of_thinning(self) -> None:
        if not self._told:
            self._told = True
            self.notice(
                "More is logged than SwanLab's local mode can write: it gets fewer points of each series, evenly, and "
                f"beyond {SERIES} names one after another; the journal has all."
            )

    def _closing(self) -> float:
        """As long as SwanLab needs for what it was given, at its pace."""
        under_way = self._handed - self.written + BATCH_SCALARS  # a batch is in the file before it is on the dashboard
        needed = CLOSING_S + 1.5 * under_way / max(1.0, self._pace.rate())
        return min(needed, FINISH_DEADLINE_S * 2 / 3)

    def _write_some(self, row: Row) -> None:
        if row.table is not None:
            # The local dashboard shows no tables.
            media = as_texts(row.table) if self.mode == "local" else as_charts(row.table)
            if media and self._has_room():
                sdk.log_at(self._run, {TABLE: media}, row.step, row.time_ns)
            else:
                self.completions_lost += len(row.table.rows)
        names = list(row.values)
        if self.mode == "local":
            # A NaN as the last value of a key breaks the project table of the local dashboard.
            names = [name for name in names if math.isfinite(row.values[name])]
            self.withheld += len(row.values) - len(names)
        size = CALL_SCALARS[self.mode]
        for begin in range(0, len(names), size):
            if not self._has_room():
                self.complete = False
                self.thinned += len(names) - begin
                break
            some = names[begin : begin + size]
            sdk.log_at(self._run, {name: row.values[name] for name in some}, row.step, row.time_ns)
            self._handed += len(some)
        self._forget(1)
        if not self._rows:
            self._pace.rest()

    def _has_room(self) -> bool:
        """Wait until SwanLab's own queue takes more; it is kept short, to be worked off before the end's deadline."""
        while sdk.calls_waiting(self._run) >= AHEAD_CALLS[self.mode]:
            self._check_consumer()
            if self.left() <= self._closing():
                return False
            time.sleep(0.005)
        self._check_consumer()
        return True

    def _check_consumer(self) -> None:
        """The Stop button of the local dashboard kills SwanLab's consumer thread; then `log` would block for ever."""
        if not sdk.is_consumed(self._run):
            raise Stopped("its consumer thread has ended (the local dashboard's Stop button does that)")

    def _stored(self, scalars: int) -> None:
        self.written += scalars
        self._pace.count(scalars)

    def _close(self, state: State, error: str | None) -> None:
        if self._run is None:
            return
        ending = threading.Thread(target=self._run.finish, args=(state, error), name="swanlab-finish", daemon=True)
        ending.start()
        ending.join(max(1.0, self.left()))
        missing = self._handed - self.written
        if ending.is_alive():
            self.complete = False
            self.thinned += missing
            self.notice(f"SwanLab did not close the run within {FINISH_DEADLINE_S:.0f} s; the journal is complete.")
            return
        self.withheld += missing
        if missing and not self._restarted:
            self.notice(
                f"SwanLab's run has not taken {many(missing, 'scalar')}: it keeps the first value of a step. The "
                "journal has all."
            )
        if self.complete:
            for directory in self._replaced:
                remove_run(Path(directory), self._settings.log_dir, self._run_id)

    def restart(self) -> None:
        """Close this run unfinished; another one will take its place."""
        self._restarted = True
        self.finish("aborted", "written again from the journal")
        self.closed.wait(max(0.0, self.left()))


def _as_swanlab_names(text: str) -> str:
    """SwanLab puts an underscore where a run id has other characters, in the names of its files."""
    return re.sub(r"\W+", "_", text, flags=re.ASCII)


def remove_run(directory: Path, log_dir: Path, run_id: str) -> None:
    """Remove a SwanLab run of ours from the disk, and from the local dashboard's index where it stands in it.

    A journal may name any directory: what does not lie in the log directory itself, or holds no run of this id, stays.
    """
    if directory.parent != log_dir or not directory.name.startswith("run-") or directory.is_symlink():
        return
    files = [path for path in directory.rglob("*") if not path.is_dir()]
    ours = _as_swanlab_names(f"run-{run_id}")
    records = [path for path in directory.glob("run-*.swanlab") if _as_swanlab_names(path.stem) == ours]
    if files and not records:
        return
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(sqlite3.Error):
        sdk.forget_run(log_dir, directory.name)


class _Pace:
    """How many scalars a second SwanLab writes while it has something to write."""

    def __init__(self) -> None:
        self._rate = 1000.0
        self._since: float | None = None
        self._scalars = 0

    def count(self, scalars: int) -> None:
        """So many were written."""
        if self._since is None:
            self._since = time.monotonic()
        else:
            self._scalars += scalars

    def rest(self) -> None:
        """Nothing waits any more."""
        self._rate = self.rate()
        self._since, self._scalars = None, 0

    def rate(self) -> float:
        """Scalars a second."""
        since = self._since
        busy = time.monotonic() - since if since is not None else 0.0
        return self._scalars / busy if busy > 2.0 else self._rate
