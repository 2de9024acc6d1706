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
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from swanlab_ray.actors.completions import TABLE
from swanlab_ray.actors.protocol import State
from swanlab_ray.actors.settings import ObserverSettings, tidy_environment
from swanlab_ray.actors.sink import FINISH_DEADLINE_S, Sink
from swanlab_ray.actors.tables import as_charts, as_texts


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
        self.waits = settings.mode != "local"  # the local dashboard is for looking at now, and takes little
        super().__init__(settings.mode, notice, on_open)

    def _open(self) -> None:
        tidy_environment()
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
        except BaseException:
            self.run_dir = None
            raise

    def _new_directory(self) -> Path:
        """Named as SwanLab names them, but known beforehand."""
        run = re.sub(r"\W+", "_", self._run_id, flags=re.ASCII)[:200].strip("_") or "run"
        while True:
            directory = self._settings.log_dir / f"run-{datetime.now():%Y%m%d_%H%M%S}-{run}"
            if not directory.exists():
                return directory
            time.sleep(0.1)

    def _swanlab_settings(self, directory: str) -> Any:
        from swanlab import Settings

        ours = self._settings
        return Settings(
            mode=self.mode,
            log_dir=Path(ours.log_dir),
            interactive=False,
            project=Settings.Project(name=ours.project, workspace=ours.workspace),
            experiment=Settings.Experiment(name=ours.experiment_name or self._run_id, description=ours.description),
            run=Settings.Run(id=self._run_id, resume="allow", dir=directory),
            # The monitor thread writes into the run file without a lock and damages it; it would also describe the
            # writer's machine, not the machines that train.
            probe=Settings.Probe(monitor=False, hardware=False, runtime=False, requirements=False, git=False),
            terminal=Settings.Terminal(proxy_type="none"),
        )

    def _update_config(self, values: dict[str, Any]) -> None:
        self._run.config.update(values)

    def _write_some(self) -> None:
        self._check_consumer()
        step, time_ns, values, table = self._rows[0]
        if table is not None:
            # The local dashboard shows no tables.
            media = as_texts(table) if self.mode == "local" else as_charts(table)
            if media:
                _log_at(self._run, {TABLE: media}, step, time_ns)
        if self.mode == "local":
            # A NaN as the last value of a key breaks the project table of the local dashboard.
            finite = {key: value for key, value in values.items() if math.isfinite(value)}
            self.withheld += len(values) - len(finite)
        else:
            finite = values
        if finite:
            _log_at(self._run, finite, step, time_ns)
            self.written += len(finite)
        self._forget(1)

    def _check_consumer(self) -> None:
        """The Stop button of the local dashboard kills SwanLab's consumer thread; then `log` would block for ever."""
        if self.mode == "local" and not any(thread.name.startswith("SwanLab·") for thread in threading.enumerate()):
            raise RuntimeError("its consumer thread has ended (the dashboard's Stop button does that)")

    def _close(self, state: State, error: str | None) -> None:
        if self._run is None:
            return
        ending = threading.Thread(target=self._run.finish, args=(state, error), name="swanlab-finish", daemon=True)
        ending.start()
        ending.join(max(1.0, self._left()))
        if ending.is_alive():
            self.complete = False
            self.notice(f"SwanLab did not close the run within {FINISH_DEADLINE_S:.0f} s; the journal is complete.")
        elif self.complete:
            for directory in self._replaced:
                remove_run(Path(directory))

    def restart(self) -> None:
        """Close this run unfinished; another one will take its place."""
        self.finish("aborted", "written again from the journal")
        self.closed.wait(FINISH_DEADLINE_S)


def remove_run(directory: Path) -> None:
    """Remove a SwanLab run from the disk, and from the local dashboard's index where it stands in it."""
    shutil.rmtree(directory, ignore_errors=True)
    index = directory.parent / "runs.swanlab"
    if index.exists():
        with suppress(sqlite3.Error), closing(sqlite3.connect(index, timeout=10)) as database, database:
            database.execute("PRAGMA foreign_keys = ON")  # charts and tags go with it
            database.execute("DELETE FROM experiment WHERE run_id = ?", (directory.name,))


def _log_at(run: Any, values: dict[str, Any], step: int, time_ns: int) -> None:
    """``run.log`` with the original time, for which SwanLab has no public argument."""
    from google.protobuf.timestamp_pb2 import Timestamp
    from swanlab.sdk.internal.bus import MetricLogEvent

    timestamp = Timestamp()
    timestamp.FromNanoseconds(time_ns)
    run._components.emitter.emit(MetricLogEvent(data=values, step=step, timestamp=timestamp))
