"""An experiment in SwanLab's cloud, through SwanLab's own client but without its SDK's queue: that one drops what the
server refuses with 401, 404 or 429, grows without bound while the server is away, and never says what has arrived.
"""

from __future__ import annotations

import csv
import math
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from pydantic import SecretStr

from swanlab_ray.actors.completions.buffers import TABLE
from swanlab_ray.actors.completions.tables import as_charts
from swanlab_ray.actors.delivery.sink import Row
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.swanlab import sdk
from swanlab_ray.actors.swanlab.limits import fit_config
from swanlab_ray.actors.swanlab.login import Account, find_account
from swanlab_ray.actors.wire.events import State
from swanlab_ray.actors.wire.text import brief

CHUNK_SCALARS = 10_000
"""Scalars in one request, as SwanLab's own client sends them."""
EXPORT_KEYS = 16
"""Series in one export, the server's limit."""
REFUSING = (400, 413, 422)
"""Answers that blame what is in the request."""


class CloudError(Exception):
    """The cloud cannot be used now. The message says why."""


class Refused(CloudError):
    """The cloud, or its client, does not take a request for what is in it."""


class ServerError(CloudError):
    """The cloud has answered with 5xx: it is out of order, or stumbles over what is in the request."""


class NoKey(CloudError):
    """There is no API key on this machine; waiting does not bring one."""


class Point(NamedTuple):
    """A value of a series; ``time_ns`` is its original Unix time in nanoseconds."""

    key: str
    step: int
    time_ns: int
    value: float


def log_in(settings: ObserverSettings) -> Account:
    """Use the account of these settings in this process from now on.

    Raises:
        NoKey: there is none.
        CloudError: its host cannot be reached, or does not accept the key.
    """
    account = find_account(settings)
    if not account.api_key:
        raise NoKey("no API key was provided: set SWANLAB_API_KEY, or run `swanlab login` on this machine")
    if not _reachable(account.api_host):  # SwanLab would say that the key is wrong, after 15 s
        raise CloudError(f"{account.api_host} cannot be reached")
    try:
        sdk.log_in(account.api_key, account.api_host)
    except Exception as error:
        raise CloudError(f"{account.api_host} did not accept the API key") from error
    return account


class CloudExperiment:
    """One experiment and what it takes to fill it. Every method but the constructor may raise :class:`CloudError`."""

    def __init__(self, settings: ObserverSettings, run_id: str) -> None:
        self._settings = settings
        self._run_id = run_id
        self._known: set[str] = set()
        self._highest: dict[str, int] = {}
        self._points: dict[str, dict[int, float] | None] = {}
        self._config: dict[str, Any] = {}
        self._opened: sdk.Opened
        self._end_heartbeat: Callable[[], None] | None = None
        self.has_log = False
        """The experiment has lines in its log already."""
        self.highest_table = -1
        """The highest step of a table of completions that the server had when the experiment was opened."""
        self.url: str | None = None

    def use_key(self, key: SecretStr) -> None:
        """Log in with this key from now on."""
        self._settings = self._settings.model_copy(update={"api_key": key})

    def open(self) -> None:
        """Log in, and create the experiment or go on with it."""
        try:
            self._open()
        except CloudError:
            raise
        except Exception as error:
            raise CloudError(brief(error)) from error

    def _open(self) -> None:
        ours = self._settings
        account = log_in(ours)
        opened = self._opened = sdk.open_experiment(
            ours.log_dir,
            CHUNK_SCALARS,
            id=self._run_id,
            project=ours.project or "",
            workspace=ours.workspace or "",
            name=ours.experiment_name or self._run_id,
            description=ours.description or "",
        )
        self.url = f"{str(account.web_host).rstrip('/')}{opened.page}"
        if not opened.is_new:
            summary = sdk.summary(opened)
            self._highest = {item["key"]: item["step"] for item in summary.get("scalar") or []}
            self._known |= self._highest.keys()
            media = {item["key"]: item["step"] for item in summary.get("media") or []}
            self.highest_table = media.get(TABLE, -1)
            self._known |= media.keys()
            self.has_log = bool(summary.get("log"))
        self.close()
        self._end_heartbeat = sdk.begin_heartbeat(opened)

    def close(self) -> None:
        """Stop telling the server that somebody is at work."""
        if self._end_heartbeat is not None:
            self._end_heartbeat()
            self._end_heartbeat = None

    def highest(self, key: str) -> int:
        """The highest step that the server had of a series when it was opened; -1 for none."""
        return self._highest.get(key, -1)

    def points(self, keys: list[str]) -> dict[str, dict[int, float]]:
        """What the server had of these series when they were first asked for: values by step.

        Raises:
            CloudError: also where the server cannot export series.
        """
        wanted = [key for key in keys if key in self._highest and key not in self._points]
        for begin in range(0, len(wanted), EXPORT_KEYS):
            some = wanted[begin : begin + EXPORT_KEYS]
            try:
                self._points.update(self._export(some))
            except Exception as error:
                raise CloudError(f"the server's points cannot be read ({brief(error)})") from error
        return {key: self._points.get(key) or {} for key in keys}

    def _export(self, keys: list[str]) -> dict[str, dict[int, float]]:
        """The server's table: a row per step, and for each series two columns, value and time."""
        columns = [
            {"experimentName": "e", "experimentId": self._opened.id, "key": key, "createdAt": self._opened.created_s}
            for key in keys
        ]
        import requests

        export = {"projectId": self._opened.project_id, "columns": columns}
        path = sdk.post("/house/metrics/scalar/export", export)["cosKey"]
        (url,) = sdk.post("/files/presigned/get", {"paths": [path]})["urls"]
        answer = requests.get(url, timeout=60)  # of a storage that need not know who we are
        answer.raise_for_status()
        answer.encoding = "utf-8"
        points: dict[str, dict[int, float]] = {key: {} for key in keys}
        for row in list(csv.reader(answer.text.splitlines()))[1:]:
            for number, key in enumerate(keys):
                cell = row[1 + 2 * number] if len(row) > 1 + 2 * number else ""
                if cell:
                    points[key][int(row[0])] = float(cell)
        return points

    def has(self, key: str) -> bool:
        """Whether the experiment has this series."""
        return key in self._known

    @property
    def a_series(self) -> str | None:
        """One that takes numbers, of those that the experiment has."""
        return next((key for key in self._known if key != TABLE), None)

    def add_series(self, keys: list[str]) -> None:
        """Make series that take numbers."""
        with _building():
            columns = [sdk.scalar_series(self._opened, key) for key in keys]
        self._send("column", columns)
        self._known.update(keys)

    def add_points(self, points: list[Point]) -> None:
        """Send points of series that are there; returns when the server has confirmed all of them."""
        with _building():
            records = [sdk.scalar(*point) for point in points]
        self._send("scalar", records)

    def add_table(self, row: Row) -> None:
        """Send the table of a row, as files in the server's storage."""
        assert row.table is not None
        with _building():
            charts = as_charts(row.table)
            if not charts:
                return
            series, value = sdk.table(self._opened, TABLE, row.step, row.time_ns, charts)
        if TABLE not in self._known:
            self._send("column", [series])
            self._known.add(TABLE)
        self._send("media", [value])

    def update_config(self, values: dict[str, Any]) -> None:
        """Add to the configuration that the server shows."""
        merged = self._config | fit_config(values)
        content = {name: {"value": value, "desc": "", "sort": n} for n, (name, value) in enumerate(merged.items())}
        self._call(sdk.upload_config, self._opened, content)
        self._config = merged

    def finish(self, state: State, error: str | None) -> None:
        """Tell the server how the run ended."""
        if error and state != "success" and not self.has_log:
            with suppress(Refused):  # the state is told all the same
                self._send("log", [sdk.error_line(error)])
            self.has_log = True
        self.close()
        self._call(sdk.stop_experiment, self._opened, state)

    def _send(self, kind: str, records: list[Any]) -> None:
        if not records:
            return
        try:
            result = sdk.upload(self._opened, kind, records)
        except Exception as error:
            raise _problem(error) from error
        if result.failures or result.remaining_records:
            failure = result.failures[0] if result.failures else None
            if failure is not None and failure.exception is None:  # its client has not even sent it
                raise Refused(failure.message)
            reason = failure.message if failure else "not confirmed"
            raise _answered(reason, failure.status if failure else None)

    @staticmethod
    def _call(function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:
            raise _problem(error) from error


def _problem(error: Exception) -> CloudError:
    """What went wrong on the way to the server: the network, or what was to be sent."""
    from requests import RequestException

    if not isinstance(error, (RequestException, OSError)):
        return Refused(brief(error))
    return _answered(brief(error), getattr(getattr(error, "response", None), "status_code", None))


def _answered(reason: str, status: int | None) -> CloudError:
    kind = Refused if status in REFUSING else ServerError if status and status >= 500 else CloudError
    return kind(f"HTTP {status}: {reason}" if status and str(status) not in reason else reason)


@contextmanager
def _building() -> Iterator[None]:
    """What SwanLab's records cannot hold counts as refused."""
    try:
        yield
    except Exception as error:
        raise Refused(brief(error)) from error


def same(one: float | None, other: float) -> bool:
    """Whether the server has this value; it keeps NaN and infinity as NaN."""
    return one is not None and (one == other or not (math.isfinite(one) or math.isfinite(other)))


def _reachable(address: str) -> bool:
    """Whether somebody answers there; taken for granted where a proxy is between."""
    parts = urlsplit(address)
    if parts.scheme in getproxies() and not proxy_bypass(parts.hostname or ""):
        return True
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), 5).close()
    except OSError:
        return False
    return True
