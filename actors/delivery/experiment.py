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
from swanlab_ray.actors.delivery.account import find_account
from swanlab_ray.actors.delivery.limits import fit_config
from swanlab_ray.actors.delivery.queue import Row, brief
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.events import State

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


class CloudExperiment:
    """One experiment and what it takes to fill it. Every method but the constructor may raise :class:`CloudError`."""

    def __init__(self, settings: ObserverSettings, run_id: str) -> None:
        self._settings = settings
        self._run_id = run_id
        self._known: set[str] = set()
        self._highest: dict[str, int] = {}
        self._points: dict[str, dict[int, float] | None] = {}
        self._config: dict[str, Any] = {}
        self._heartbeat: Any = None
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
        from google.protobuf.timestamp_pb2 import Timestamp
        from swanlab.proto.swanlab.run.v1.run_pb2 import ResumeMode, StartRecord
        from swanlab.sdk.internal.core_python import client
        from swanlab.sdk.internal.core_python.api.experiment import get_experiment_summary
        from swanlab.sdk.internal.core_python.context import CoreConfig, CoreContext
        from swanlab.sdk.internal.core_python.heartbeat import Heartbeat
        from swanlab.sdk.internal.core_python.transport.sender import HttpRecordSender
        from swanlab.sdk.internal.core_python.utils import generate_run_online_path, prepare_experiment_start
        from swanlab.sdk.internal.pkg import helper
        from swanlab.utils.time import parse_resp_timestamp_s

        ours = self._settings
        account = find_account(ours)
        if not account.api_key:
            raise NoKey("no API key was provided: set SWANLAB_API_KEY, or run `swanlab login` on this machine")
        if not _reachable(account.api_host):  # SwanLab would say that the key is wrong, after 15 s
            raise CloudError(f"{account.api_host} cannot be reached")
        if client.exists():
            client.reset()
        try:
            session = client.new(account.api_key, account.api_host, timeout=10)._session
        except Exception as error:
            raise CloudError(f"{account.api_host} did not accept the API key") from error
        session.max_redirects = 0  # it would tell another host who we are
        now = Timestamp()
        now.GetCurrentTime()
        start = StartRecord(
            id=self._run_id,
            project=ours.project or "",
            workspace=ours.workspace or "",
            name=ours.experiment_name or self._run_id,
            description=ours.description or "",
            resume=ResumeMode.RESUME_MODE_ALLOW,
            started_at=now,
        )
        made = prepare_experiment_start(start)
        self._client = client
        self._place = (made.username, made.project, made.experiment["cuid"])
        self._project_id = made.project_data["cuid"]
        self._created = parse_resp_timestamp_s(made.experiment["createdAt"])
        self.url = f"{str(account.web_host).rstrip('/')}{helper.fmt_run_path(generate_run_online_path(made))}"
        config = CoreConfig(self._run_id, ours.log_dir, 0, CHUNK_SCALARS, 1.5, 0, 0, 0, 0, skip_store=True)
        context = CoreContext(config=config)
        version = made.project_data.get("version")
        context.set_online_params(*self._place[:2], self._project_id, version, self._place[2])
        if version == 1:
            self._sender = HttpRecordSender(context)
        else:
            from swanlab.deprecated.sender import DeprecatedHttpRecordSender

            self._sender = DeprecatedHttpRecordSender(context)
        if not made.new_experiment:
            summary = get_experiment_summary(self._project_id, self._place[2], made.experiment["createdAt"])
            self._highest = {item["key"]: item["step"] for item in summary.get("scalar") or []}
            self._known |= self._highest.keys()
            media = {item["key"]: item["step"] for item in summary.get("media") or []}
            self.highest_table = media.get(TABLE, -1)
            self._known |= media.keys()
            self.has_log = bool(summary.get("log"))
        self.close()
        self._heartbeat = Heartbeat(self._place[2])
        self._heartbeat.start()

    def close(self) -> None:
        """Stop telling the server that somebody is at work."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None

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
            {"experimentName": "e", "experimentId": self._place[2], "key": key, "createdAt": self._created}
            for key in keys
        ]
        import requests

        export = {"projectId": self._project_id, "columns": columns}
        path = self._client.post("/house/metrics/scalar/export", export, log_error=False).data["cosKey"]
        (url,) = self._client.post("/files/presigned/get", {"paths": [path]}, log_error=False).data["urls"]
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
        from swanlab.proto.swanlab.metric.column.v1.column_pb2 import ColumnType
        from swanlab.proto.swanlab.metric.data.v1.data_pb2 import ScalarRecord

        with _building():
            scalars = [ScalarRecord(key=key, type=ColumnType.COLUMN_TYPE_SCALAR) for key in keys]
            columns = [self._column(scalar) for scalar in scalars]
        self._send("column", columns)
        self._known.update(keys)

    def add_points(self, points: list[Point]) -> None:
        """Send points of series that are there; returns when the server has confirmed all of them."""
        with _building():
            records = [_record(point) for point in points]
        self._send("scalar", records)

    def add_table(self, row: Row) -> None:
        """Send the table of a row, as files in the server's storage."""
        from google.protobuf.timestamp_pb2 import Timestamp
        from swanlab.proto.swanlab.record.v1.record_pb2 import Record
        from swanlab.sdk.internal.run.transforms import ECharts

        assert row.table is not None
        with _building():
            timestamp = Timestamp()
            timestamp.FromNanoseconds(row.time_ns)
            items = [ECharts(chart).transform(step=row.step, path=None) for chart in as_charts(row.table)]
            if not items:
                return
            media = ECharts.build_data_record(key=TABLE, step=row.step, timestamp=timestamp, data=items)
            column = self._column(media)
        if TABLE not in self._known:
            self._send("column", [column])
            self._known.add(TABLE)
        self._send("media", [Record(media=media, timestamp=timestamp)])

    def _column(self, data: Any) -> Any:
        from google.protobuf.timestamp_pb2 import Timestamp
        from swanlab.proto.swanlab.record.v1.record_pb2 import Record
        from swanlab.sdk.internal.core_python.pkg.builder import build_auto_column

        now = Timestamp()
        now.GetCurrentTime()
        return Record(column=build_auto_column(self._sender._ctx, data), timestamp=now)

    def update_config(self, values: dict[str, Any]) -> None:
        """Add to the configuration that the server shows."""
        from swanlab.sdk.internal.core_python.api.upload import upload_config

        merged = self._config | fit_config(values)
        content = {name: {"value": value, "desc": "", "sort": n} for n, (name, value) in enumerate(merged.items())}
        self._call(upload_config, *self._place, content=content)
        self._config = merged

    def finish(self, state: State, error: str | None) -> None:
        """Tell the server how the run ended."""
        from google.protobuf.timestamp_pb2 import Timestamp
        from swanlab.proto.swanlab.record.v1.record_pb2 import Record
        from swanlab.proto.swanlab.run.v1.run_pb2 import RUN_STATE_ABORTED, RUN_STATE_CRASHED, RUN_STATE_FINISHED
        from swanlab.proto.swanlab.terminal.v1.log_pb2 import LogLevel, LogRecord
        from swanlab.sdk.internal.core_python.api.experiment import stop_experiment

        now = Timestamp()
        now.GetCurrentTime()
        if error and state != "success" and not self.has_log:
            line = LogRecord(timestamp=now, level=LogLevel.LOG_LEVEL_ERROR, line=error, epoch=1)
            with suppress(Refused):  # the state is told all the same
                self._send("log", [Record(log=line, timestamp=now)])
            self.has_log = True
        states = {"success": RUN_STATE_FINISHED, "crashed": RUN_STATE_CRASHED, "aborted": RUN_STATE_ABORTED}
        self.close()
        self._call(stop_experiment, *self._place, state=states[state], finished_at=now)

    def _send(self, kind: str, records: list[Any]) -> None:
        if not records:
            return
        try:
            result = self._sender.upload(kind, records)
        except Exception as error:
            raise _problem(error) from error
        if result.failures or result.remaining_records:
            failure = result.failures[0] if result.failures else None
            if failure is not None and failure.exception is None:  # its client has not even sent it
                raise Refused(failure.message)
            reason = failure.message if failure else "not confirmed"
            raise _answered(reason, failure.status if failure else None)

    @staticmethod
    def _call(function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        try:
            function(*arguments, **named)
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


def _record(point: Point) -> Any:
    from google.protobuf.timestamp_pb2 import Timestamp
    from swanlab.proto.swanlab.metric.column.v1.column_pb2 import ColumnType
    from swanlab.proto.swanlab.metric.data.v1.data_pb2 import ScalarRecord
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    timestamp = Timestamp()
    timestamp.FromNanoseconds(point.time_ns)
    scalar = ScalarRecord(key=point.key, step=point.step, timestamp=timestamp, type=ColumnType.COLUMN_TYPE_SCALAR)
    scalar.value.number = point.value
    return Record(scalar=scalar, timestamp=timestamp)


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
