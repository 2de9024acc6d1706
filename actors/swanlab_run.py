"""The one SwanLab run: opened once, written by one thread, closed with the true state."""

from __future__ import annotations

import math
import os
import shutil
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from swanlab_ray.actors.protocol import State
from swanlab_ray.actors.settings import ObserverSettings

QUEUE_SCALARS = 1_000_000
"""Scalars that may wait for SwanLab; what comes beyond that is thinned and counted."""
FINISH_DEADLINE_S = 60.0
"""How long closing may take; SwanLab itself has no limit when its server is down."""


class SwanLabRun:
    """Hands rows to SwanLab from a thread of its own, so that a slow SwanLab never holds up the ranks.

    ``notices`` gets sentences for the user. Opening fails in cloud mode without a key or a network; then the run is
    kept offline, and a notice says so and how to upload it.
    """

    def __init__(self, settings: ObserverSettings, run_id: str, notices: list[str]) -> None:
        self._settings = settings
        self._run_id = run_id
        self._run: Any = None
        self._rows: deque[tuple[int, int, dict[str, float]]] = deque()
        self._configs: deque[dict[str, Any]] = deque()
        self._waiting = 0  # scalars in _rows
        self._failed = False
        self._ending = threading.Event()
        self._wake = threading.Event()
        self._end: tuple[State, str | None] = ("success", None)
        self._drain_until = math.inf
        self.closed = threading.Event()
        self.mode = settings.mode
        self.run_dir: str | None = None
        self.url: str | None = None
        self.notices = notices
        self.written = 0
        self.thinned = 0
        self.withheld = 0
        self._thread = threading.Thread(target=self._work, name="swanlab-run", daemon=True)
        self._thread.start()

    def write(self, step: int, time_ns: int, values: dict[str, float]) -> None:
        """Queue a row. ``time_ns`` is the original Unix time in nanoseconds. Never blocks."""
        if self._waiting + len(values) > QUEUE_SCALARS or self._failed:
            self.thinned += len(values)
            return
        self._waiting += len(values)
        self._rows.append((step, time_ns, values))

    def config(self, values: dict[str, Any]) -> None:
        """Queue an update of the run's configuration."""
        self._configs.append(values)

    def lag(self) -> float:
        """Seconds since the oldest row that SwanLab has not got yet was logged."""
        try:
            return max(0.0, time.time() - self._rows[0][1] / 1e9)
        except IndexError:
            return 0.0

    def finish(self, state: State, error: str | None) -> None:
        """Write what is queued and close the run; ``closed`` is set when that is done or given up."""
        self._end = (state, error)
        self._drain_until = time.monotonic() + FINISH_DEADLINE_S
        self._ending.set()
        self._wake.set()

    def _work(self) -> None:
        try:
            self._run = self._open()
            while not self._ending.is_set():
                self._write_queued()
                self._wake.wait(0.1)
            self._write_queued()
            self._close()
        except Exception as error:  # the writer must go on answering the ranks
            self.notices.append(f"SwanLab stopped taking data: {_brief(error)}. The rest of this run is not in it.")
            self._failed = True
            self._ending.wait()
            self._close()
        finally:
            self.thinned += self._waiting
            self.closed.set()

    def _open(self) -> Any:
        # SwanLab fails on this variable, and would read a stray .env of the directory Ray starts workers in.
        os.environ.pop("SWANLAB_PROJECT", None)
        import swanlab

        try:
            self._settings.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"log_dir '{self._settings.log_dir}' cannot be made on the writer's machine ({error.strerror}); "
                "choose another with log_dir= or SWANLAB_LOG_DIR"
            ) from None
        try:
            run = swanlab.init(settings=self._swanlab_settings("online" if self.mode == "cloud" else self.mode))
        except Exception as error:
            if self.mode != "cloud":
                raise
            self._remove_failed_start()
            run = swanlab.init(settings=self._swanlab_settings("offline"))
            self.mode = "offline"
            self.notices.append(
                f"The SwanLab cloud cannot be used ({_brief(error)}); this run is kept offline, upload it later with: "
                f"swanlab sync {run.dir} --id {self._run_id}"
            )
        if self.mode == "cloud":
            self.url = run.url
        self.run_dir = str(run.dir)
        return run

    def _remove_failed_start(self) -> None:
        """SwanLab leaves an empty run directory behind when it cannot reach its cloud."""
        mine = f"run-*{self._run_id.replace('-', '_')}*"
        for path in self._settings.log_dir.glob(mine):
            if not any(file.stat().st_size for file in path.glob("*.swanlab")):
                shutil.rmtree(path, ignore_errors=True)

    def _swanlab_settings(self, mode: str) -> Any:
        from swanlab import Settings

        ours = self._settings
        options = {
            "api_key": ours.api_key.get_secret_value() if ours.api_key else None,
            "api_host": ours.api_host,
            "web_host": ours.web_host,
        }
        return Settings(
            mode=mode,
            log_dir=Path(ours.log_dir),
            interactive=False,
            project=Settings.Project(name=ours.project, workspace=ours.workspace),
            experiment=Settings.Experiment(name=ours.experiment_name or self._run_id, description=ours.description),
            run=Settings.Run(id=self._run_id, resume="allow"),
            # The monitor thread writes into the run file without a lock and damages it; it would also describe the
            # writer's machine, not the machines that train.
            probe=Settings.Probe(monitor=False, hardware=False, runtime=False, requirements=False, git=False),
            terminal=Settings.Terminal(proxy_type="none"),
            **{name: value for name, value in options.items() if value},
        )

    def _write_queued(self) -> None:
        while self._configs:
            self._run.config.update(self._configs.popleft())
        while self._rows:
            if time.monotonic() > self._drain_until:
                self.notices.append(f"SwanLab did not take {self._waiting} scalars within {FINISH_DEADLINE_S:.0f} s.")
                return
            self._check_consumer()
            step, time_ns, values = self._rows[0]
            if self.mode == "local":
                # A NaN as the last value of a key breaks the project table of the local dashboard.
                finite = {key: value for key, value in values.items() if math.isfinite(value)}
                self.withheld += len(values) - len(finite)
            else:
                finite = values
            if finite:
                _log_at(self._run, finite, step, time_ns)
                self.written += len(finite)
            self._rows.popleft()
            self._waiting -= len(values)

    def _check_consumer(self) -> None:
        """The Stop button of the local dashboard kills SwanLab's consumer thread; then `log` would block for ever."""
        if self.mode == "local" and not any(thread.name.startswith("SwanLab·") for thread in threading.enumerate()):
            raise RuntimeError("its consumer thread has ended (the dashboard's Stop button does that)")

    def _close(self) -> None:
        if self._run is None:
            return
        state, error = self._end
        closing = threading.Thread(target=self._run.finish, args=(state, error), name="swanlab-finish", daemon=True)
        closing.start()
        closing.join(max(1.0, self._drain_until - time.monotonic()))
        if closing.is_alive():
            self.notices.append(
                f"SwanLab did not close the run within {FINISH_DEADLINE_S:.0f} s; the local record is complete, "
                f"upload it with: swanlab sync {self.run_dir} --id {self._run_id}"
            )


def _log_at(run: Any, values: dict[str, float], step: int, time_ns: int) -> None:
    """``run.log`` with the original time, for which SwanLab has no public argument."""
    from google.protobuf.timestamp_pb2 import Timestamp
    from swanlab.sdk.internal.bus import MetricLogEvent

    timestamp = Timestamp()
    timestamp.FromNanoseconds(time_ns)
    run._components.emitter.emit(MetricLogEvent(data=values, step=step, timestamp=timestamp))


def _brief(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def stderr(line: str) -> None:
    """The actor's log tab: what people see first in the Ray dashboard."""
    with suppress(OSError):  # a full disk
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
