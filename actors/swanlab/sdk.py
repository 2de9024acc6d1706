"""What we use of SwanLab's private parts. Nothing else imports them, so that another SwanLab breaks this file only.

Its public functions do not do: they take no time of a value and do not tell what they have written; and the queue in
front of its cloud drops what the server refuses with 401, 404 or 429, and never says what has arrived.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from swanlab_ray.actors.wire.events import State

PRIVATE = {
    "swanlab>=0.10.3": {
        "log a value with its original time": (
            "swanlab.sdk.internal.run:Run()._components",
            "swanlab.sdk.internal.run.components:Components.emitter",
            "swanlab.sdk.internal.bus:RunEmitter.emit(event)",
            "swanlab.sdk.internal.bus:MetricLogEvent(data, step, timestamp)",
        ),
        "know how many calls wait in SwanLab, to keep them few": ("swanlab.sdk.internal.bus:RunEmitter.queue",),
        "notice that SwanLab's thread has ended": (
            "swanlab.sdk.internal.run.components:Components.consumer",
            "swanlab.sdk.internal.run.components:BackgroundConsumer()._thread",
        ),
        "count what stands in a run's file": (
            "swanlab.sdk.internal.run:Run()._core",
            "swanlab.sdk.internal.core_python:CorePython._upsert_scalars_to_metrics(scalars_list)",
        ),
        "tell whether two addresses are of one host": ("swanlab.sdk.internal.settings:resolve_hosts(api_host)",),
        "log in, and follow no redirect": (
            "swanlab.sdk.internal.core_python:client.exists()",
            "swanlab.sdk.internal.core_python:client.reset()",
            "swanlab.sdk.internal.core_python:client.new(api_key, base_url, timeout)",
            "swanlab.sdk.internal.pkg.client:Client()._session",
        ),
        "create an experiment or go on with it": (
            "swanlab.proto.swanlab.run.v1.run_pb2:StartRecord",
            "swanlab.proto.swanlab.run.v1.run_pb2:ResumeMode.RESUME_MODE_ALLOW",
            "swanlab.sdk.internal.core_python.utils:prepare_experiment_start(record)",
        ),
        "say where an experiment is shown": (
            "swanlab.sdk.internal.core_python.utils:generate_run_online_path(result)",
            "swanlab.sdk.internal.pkg:helper.fmt_run_path(run_path)",
        ),
        "know what the cloud has already": (
            "swanlab.sdk.internal.core_python.api.experiment:get_experiment_summary(project_id, experiment_id, "
            "created_at)",
            "swanlab.sdk.internal.core_python:client.post(url, data, log_error)",
            "swanlab.utils.time:parse_resp_timestamp_s(value)",
        ),
        "tell the cloud that a run goes on, and no more": (
            "swanlab.sdk.internal.core_python.heartbeat:Heartbeat(experiment_id)",
            "swanlab.sdk.internal.core_python.heartbeat:Heartbeat.start()",
            "swanlab.sdk.internal.core_python.heartbeat:Heartbeat.stop()",
        ),
        "send records, and know which of them were confirmed": (
            "swanlab.sdk.internal.core_python.context:CoreConfig(run_id, run_dir, section_rule, record_batch, "
            "record_interval, save_size, save_split, save_part, save_batch, skip_store)",
            "swanlab.sdk.internal.core_python.context:CoreContext(config)",
            "swanlab.sdk.internal.core_python.context:CoreContext.set_online_params(username, project, project_id, "
            "project_version, experiment_id)",
            "swanlab.sdk.internal.core_python.transport.sender:HttpRecordSender(ctx)",
            "swanlab.sdk.internal.core_python.transport.sender:HttpRecordSender.upload(record_type, records)",
            "swanlab.deprecated.sender:DeprecatedHttpRecordSender(ctx)",
        ),
        "make records of series, values, tables and what a run has failed of": (
            "swanlab.proto.swanlab.record.v1.record_pb2:Record",
            "swanlab.proto.swanlab.metric.column.v1.column_pb2:ColumnType.COLUMN_TYPE_SCALAR",
            "swanlab.proto.swanlab.metric.data.v1.data_pb2:ScalarRecord",
            "swanlab.sdk.internal.core_python.pkg.builder:build_auto_column(ctx, data_record)",
            "swanlab.sdk.internal.run.transforms:ECharts(chart)",
            "swanlab.sdk.internal.run.transforms:ECharts.transform(step, path)",
            "swanlab.sdk.internal.run.transforms:ECharts.build_data_record(key, step, timestamp, data)",
            "swanlab.proto.swanlab.terminal.v1.log_pb2:LogRecord",
            "swanlab.proto.swanlab.terminal.v1.log_pb2:LogLevel.LOG_LEVEL_ERROR",
        ),
        "send a configuration": (
            "swanlab.sdk.internal.core_python.api.upload:upload_config(username, project, experiment_id, content)",
        ),
        "tell the cloud how a run has ended": (
            "swanlab.proto.swanlab.run.v1.run_pb2:RUN_STATE_FINISHED",
            "swanlab.proto.swanlab.run.v1.run_pb2:RUN_STATE_CRASHED",
            "swanlab.proto.swanlab.run.v1.run_pb2:RUN_STATE_ABORTED",
            "swanlab.sdk.internal.core_python.api.experiment:stop_experiment(username, project, experiment_id, state, "
            "finished_at)",
        ),
    }
}
"""What we do with which private names, by the versions that have them; ``tests/test_contracts.py`` looks for each."""


# A run on disk


def log_at(run: Any, values: dict[str, Any], step: int, time_ns: int) -> None:
    """``run.log`` with the original time."""
    from swanlab.sdk.internal.bus import MetricLogEvent

    run._components.emitter.emit(MetricLogEvent(data=values, step=step, timestamp=_timestamp(time_ns)))


def calls_waiting(run: Any) -> int:
    """Calls of ``run.log`` that SwanLab has not come to yet."""
    return int(run._components.emitter.queue.qsize())


def is_consumed(run: Any) -> bool:
    """Whether the thread lives that takes what is logged; without it ``run.log`` blocks for ever in the end."""
    return bool(run._components.consumer._thread.is_alive())


def count_stored(run: Any, stored: Callable[[int], None]) -> None:
    """Be told how many scalars SwanLab has written to its run's file, whenever it has."""
    core = run._core
    write = core._upsert_scalars_to_metrics

    def counted(scalars: list[Any]) -> Any:
        records = write(scalars)
        stored(sum(record.HasField("scalar") for record in records))
        return records

    core._upsert_scalars_to_metrics = counted


def forget_run(log_dir: Path, directory: str) -> None:
    """Remove a run from the local dashboard's index.

    Raises:
        sqlite3.Error: the index is not as expected.
    """
    index = log_dir / "runs.swanlab"
    if index.exists():
        with closing(sqlite3.connect(index, timeout=10)) as database, database:
            database.execute("PRAGMA foreign_keys = ON")  # charts and tags go with it
            database.execute("DELETE FROM experiment WHERE run_id = ?", (directory,))


# The cloud. Whatever fails raises what SwanLab's client raises.


def host_of(address: str) -> str | None:
    """The host that SwanLab's client takes an address for."""
    from swanlab.sdk.internal.settings import resolve_hosts

    host: str | None = resolve_hosts(address)[0]
    return host


def log_in(api_key: str, api_host: str) -> None:
    """Use this account from now on; a process has one."""
    from swanlab.sdk.internal.core_python import client

    if client.exists():
        client.reset()
    client.new(api_key, api_host, timeout=10)._session.max_redirects = 0  # it would tell another host who we are


def post(path: str, body: dict[str, Any]) -> Any:
    """The server's answer to a request."""
    from swanlab.sdk.internal.core_python import client

    return client.post(path, body, log_error=False).data


class Opened(NamedTuple):
    """An experiment in the cloud."""

    place: tuple[str, str, str]
    """User, project, and the experiment's id."""
    project_id: str
    created: Any
    """When, as the server tells it."""
    is_new: bool
    page: str
    """Path of its page."""
    context: Any
    sender: Any
    """SwanLab's, which takes records of it, in this context."""

    @property
    def id(self) -> str:
        """Of the experiment."""
        return self.place[2]

    @property
    def created_s(self) -> int:
        """When it was created, in Unix seconds."""
        from swanlab.utils.time import parse_resp_timestamp_s

        return int(parse_resp_timestamp_s(self.created))


def open_experiment(log_dir: Path, chunk: int, **start: str) -> Opened:
    """Create an experiment, or go on with it.

    Args:
        log_dir: takes nothing, but the client wants to know.
        chunk: records in one request.
        start: id, project, workspace, name, description.
    """
    from swanlab.deprecated.sender import DeprecatedHttpRecordSender
    from swanlab.proto.swanlab.run.v1.run_pb2 import ResumeMode, StartRecord
    from swanlab.sdk.internal.core_python.context import CoreConfig, CoreContext
    from swanlab.sdk.internal.core_python.transport.sender import HttpRecordSender
    from swanlab.sdk.internal.core_python.utils import generate_run_online_path, prepare_experiment_start
    from swanlab.sdk.internal.pkg import helper

    made = prepare_experiment_start(StartRecord(resume=ResumeMode.RESUME_MODE_ALLOW, started_at=_timestamp(), **start))
    place = (made.username, made.project, made.experiment["cuid"])
    project, version = made.project_data["cuid"], made.project_data.get("version")
    context = CoreContext(config=CoreConfig(start["id"], log_dir, 0, chunk, 1.5, 0, 0, 0, 0, skip_store=True))
    context.set_online_params(*place[:2], project, version, place[2])
    kind = HttpRecordSender if version == 1 else DeprecatedHttpRecordSender
    page = helper.fmt_run_path(generate_run_online_path(made))
    created = made.experiment["createdAt"]
    return Opened(place, project, created, made.new_experiment, page, context, kind(context))


def summary(opened: Opened) -> dict[str, Any]:
    """What the server has of an experiment: keys and highest steps under ``scalar`` and ``media``; ``log``."""
    from swanlab.sdk.internal.core_python.api.experiment import get_experiment_summary

    found: dict[str, Any] = get_experiment_summary(opened.project_id, opened.id, opened.created)
    return found


def begin_heartbeat(opened: Opened) -> Callable[[], None]:
    """Tell the server every few minutes that somebody is at work; returns what ends that."""
    from swanlab.sdk.internal.core_python.heartbeat import Heartbeat

    heartbeat = Heartbeat(opened.id)
    heartbeat.start()
    stop: Callable[[], None] = heartbeat.stop
    return stop


def upload(opened: Opened, kind: str, records: list[Any]) -> Any:
    """Send records; returns SwanLab's ``UploadResult``, which says what of them was confirmed."""
    return opened.sender.upload(kind, records)


def upload_config(opened: Opened, content: dict[str, Any]) -> None:
    """Replace the configuration of an experiment."""
    from swanlab.sdk.internal.core_python.api.upload import upload_config

    upload_config(*opened.place, content=content)


def stop_experiment(opened: Opened, state: State) -> None:
    """Tell the server how the run ended."""
    from swanlab.proto.swanlab.run.v1.run_pb2 import RUN_STATE_ABORTED, RUN_STATE_CRASHED, RUN_STATE_FINISHED
    from swanlab.sdk.internal.core_python.api.experiment import stop_experiment

    states = {"success": RUN_STATE_FINISHED, "crashed": RUN_STATE_CRASHED, "aborted": RUN_STATE_ABORTED}
    stop_experiment(*opened.place, state=states[state], finished_at=_timestamp())


# Records


def scalar_series(opened: Opened, key: str) -> Any:
    """A series that takes numbers."""
    from swanlab.proto.swanlab.metric.column.v1.column_pb2 import ColumnType
    from swanlab.proto.swanlab.metric.data.v1.data_pb2 import ScalarRecord

    return _series(opened, ScalarRecord(key=key, type=ColumnType.COLUMN_TYPE_SCALAR))


def scalar(key: str, step: int, time_ns: int, value: float) -> Any:
    """A value of a series."""
    from swanlab.proto.swanlab.metric.column.v1.column_pb2 import ColumnType
    from swanlab.proto.swanlab.metric.data.v1.data_pb2 import ScalarRecord
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    timestamp = _timestamp(time_ns)
    scalar = ScalarRecord(key=key, step=step, timestamp=timestamp, type=ColumnType.COLUMN_TYPE_SCALAR)
    scalar.value.number = value
    return Record(scalar=scalar, timestamp=timestamp)


def table(opened: Opened, key: str, step: int, time_ns: int, charts: list[Any]) -> tuple[Any, Any]:
    """A series of tables, and charts as one value of it."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.run.transforms import ECharts

    timestamp = _timestamp(time_ns)
    items = [ECharts(chart).transform(step=step, path=None) for chart in charts]
    media = ECharts.build_data_record(key=key, step=step, timestamp=timestamp, data=items)
    return _series(opened, media), Record(media=media, timestamp=timestamp)


def error_line(text: str) -> Any:
    """The first line of an experiment's log, an error."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.proto.swanlab.terminal.v1.log_pb2 import LogLevel, LogRecord

    now = _timestamp()
    line = LogRecord(timestamp=now, level=LogLevel.LOG_LEVEL_ERROR, line=text, epoch=1)
    return Record(log=line, timestamp=now)


def _series(opened: Opened, first: Any) -> Any:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.pkg.builder import build_auto_column

    return Record(column=build_auto_column(opened.context, first), timestamp=_timestamp())


def _timestamp(time_ns: int | None = None) -> Any:
    """A time in Unix nanoseconds, or now."""
    from google.protobuf.timestamp_pb2 import Timestamp

    timestamp = Timestamp()
    if time_ns is None:
        timestamp.GetCurrentTime()
    else:
        timestamp.FromNanoseconds(time_ns)
    return timestamp
