"""Rows on their way into SwanLab's cloud: one thread sends request after request, each until it is confirmed, and tells
the journal how far it is. What the cloud may have already is asked for before anything is sent a second time.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

from pydantic import SecretStr

from swanlab_ray.actors.completions.tables import Table
from swanlab_ray.actors.delivery.refusals import Delivery, Withheld
from swanlab_ray.actors.delivery.sink import GaveUp, Row, Sink
from swanlab_ray.actors.log import log
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.swanlab.experiment import CHUNK_SCALARS, CloudError, CloudExperiment, NoKey, same
from swanlab_ray.actors.swanlab.limits import Limits
from swanlab_ray.actors.wire.events import State

RETRY_S = (1.0, 30.0)
"""First and longest pause between two attempts."""
AWAY_PATIENCE_S = 10.0
"""How long the end of a run waits for a cloud that has been away for :data:`AWAY_S`."""
AWAY_S = 30.0
KEY_PATIENCE_S = 5.0
"""How long it is not said that there is no API key: a rank may have one."""
PERSISTENT = 4
"""After so many failures of the same rows they may be to blame, if the cloud takes others."""


class CloudRun(Sink):
    """Writes rows to an experiment, for as long as it takes.

    Args:
        settings: whose cloud, project and experiment.
        run_id: also the experiment's id.
        delivered: how many of the run's rows the cloud has confirmed already; of those that follow it may have some,
            since the writer was killed before it could note that down.
        place: where the journal lies, for the sentence that says how to upload it.
        on_delivered: called with the number of rows that the cloud has confirmed.
        notice, on_open: see :class:`Sink`.
    """

    def __init__(
        self,
        settings: ObserverSettings,
        run_id: str,
        delivered: int,
        place: str,
        on_delivered: Callable[[int], None],
        notice: Callable[[str], None],
        on_open: Callable[[Sink], None],
    ) -> None:
        self._experiment = CloudExperiment(settings, run_id)
        self._place = place
        self._on_delivered = on_delivered
        self._skip = self.delivered = delivered
        self._running: dict[str, int] = {}  # highest step of each series that came here
        self._last_table = -1  # highest step of a table that came here
        self._away_since: float | None = None
        self._told = self._no_key = False
        self._offered: SecretStr | None = None
        limits = Limits(notice)
        self._delivery = Delivery(self._experiment, limits, notice)
        super().__init__("cloud", notice, on_open, limits)

    def write(self, step: int, time_ns: int, values: dict[str, float], table: Table | None = None) -> None:
        """Queue a row, unless it was delivered before. Waits where the queue is full."""
        if self._skip:
            values = self._fit(step, time_ns, values, table).values
            self._skip -= 1
            self.written += len(values)
            if table is not None:
                self._last_table = max(step, self._last_table)
            for key in values:
                self._running[key] = max(step, self._running.get(key, -1))
            return
        super().write(step, time_ns, values, table)

    def offer_key(self, key: SecretStr) -> None:
        """A rank has a key, of which there is use if none was given to the writer."""
        self._offered = key

    def _open(self) -> None:
        self._until_it_works(self._experiment.open)
        self.url = self._experiment.url
        self._on_open(self)

    def _update_config(self, values: dict[str, Any]) -> None:
        self._until_it_works(lambda: self._delivery.config(values))

    def _write_some(self, first: Row) -> None:
        rows: list[Row] = []
        missing: list[Row] = []
        attempts = itertools.count()

        def deliver() -> Withheld:
            """With what has come since the last attempt: it may show that the first rows are to blame."""
            new = self._chunk(beyond_table=bool(rows))[len(rows) :]
            rows.extend(new)
            missing.extend(row for row in map(self._missing, new) if row.values or row.table)
            return self._delivery.deliver(missing, next(attempts) > PERSISTENT) if missing else Withheld()

        withheld = self._until_it_works(deliver)
        self.withheld += withheld.scalars
        self.completions_lost += withheld.completions
        self.complete = self.complete and not any(withheld)
        self.written += sum(len(row.values) for row in rows) - withheld.scalars
        self.delivered += len(rows)
        self._forget(len(rows))
        self._on_delivered(self.delivered)

    def _chunk(self, beyond_table: bool) -> list[Row]:
        """The rows of the next request; a table is one of its own, unless what lies beyond it is wanted as well."""
        rows: list[Row] = []
        scalars = 0
        with self._room:  # others come meanwhile
            for row in self._rows:
                if rows and (scalars + len(row.values) > CHUNK_SCALARS or row.table is not None):
                    break
                rows.append(row)
                scalars += len(row.values)
                if row.table is not None and not beyond_table:
                    break
        return rows

    def _missing(self, row: Row) -> Row:
        """What of a row the cloud does not have.

        Rows arrive there in order. So of a series whose steps rise, exactly those up to the highest one are there; for
        any other step below that the points themselves are asked for.
        """
        needed = {}
        for key, value in row.values.items():
            highest = self._experiment.highest(key)
            rises = row.step > self._running.get(key, -1)
            if rises:
                self._running[key] = row.step
            if row.step <= highest and (rises or same(self._points_of(key).get(row.step), value)):
                continue
            needed[key] = value
        table = row.table
        if table is not None:
            rises = row.step > self._last_table
            self._last_table = max(row.step, self._last_table)
            if rises and row.step <= self._experiment.highest_table:
                table = None
        return Row(row.step, row.time_ns, needed, table)

    def _points_of(self, key: str) -> dict[int, float]:
        try:
            return self._experiment.points([key])[key]
        except CloudError:  # then it is sent, for the second time perhaps, but with the same value
            return {}

    def _close(self, state: State, error: str | None) -> None:
        if self._rows:
            raise self._gave_up("it did not take everything in time")
        self._until_it_works(lambda: self._experiment.finish(state, error))

    def _patience(self) -> float:
        if self._no_key:
            return 0.0
        away = self._away_since is not None and time.monotonic() - self._away_since > AWAY_S
        return AWAY_PATIENCE_S if away else super()._patience()

    def _until_it_works(self, attempt: Callable[[], Any]) -> Any:
        """Try until it works or the end's deadline passes; the user is told once per outage."""
        pause = RETRY_S[0]
        while True:
            try:
                result = attempt()
            except CloudError as error:
                self._no_key = isinstance(error, NoKey)
                offered, self._offered = self._offered, None
                if self._no_key and offered is not None:
                    self._experiment.use_key(offered)
                    continue
                self._away(str(error))
                if self.left() <= 0 or (self._no_key and self.left() < math.inf):  # no time brings a key
                    raise self._gave_up(str(error)) from error
                self._wake.wait(min(pause, max(0.1, self.left())))
                if self._end is not None:
                    time.sleep(min(0.5, max(0.0, self.left())))  # _wake stays set
                pause = min(pause * 2, RETRY_S[1])
                continue
            if self._away_since is not None:
                self._away_since = None
                log("the SwanLab cloud is back; catching up")
            return result

    def _away(self, reason: str) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            log(f"the SwanLab cloud is away: {reason}")
        # A rank that has a key says so in a moment.
        soon = self._no_key and self.left() == math.inf and time.monotonic() - self._away_since < KEY_PATIENCE_S
        if not self._told and not soon:
            self._told = True
            self.notice(
                f"The SwanLab cloud cannot be used ({reason}); the run goes on in the journal, and arrives there once "
                f"it can, or with: swanlab-ray sync {self._place}"
            )

    def _gave_up(self, reason: str) -> GaveUp:
        self._experiment.close()
        self.notice(
            f"The SwanLab cloud does not have the whole run ({reason}); the journal does, upload it with: "
            f"swanlab-ray sync {self._place}"
        )
        return GaveUp(reason)
