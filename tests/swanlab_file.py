"""Reads back what SwanLab has on disk: its run file, with SwanLab's own reader and protobufs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass
class RunFile:
    """One run directory. ``scalars`` maps a name to ``{step: value}``; a step written twice fails the reading."""

    path: Path
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    times: dict[str, dict[int, float]] = field(default_factory=dict)
    media: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    """Contents of media files by name and step."""
    captions: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    state: str | None = None
    error: str = ""

    @property
    def config(self) -> dict[str, Any]:
        stored = yaml.safe_load((self.path / "files" / "config.yaml").read_text()) or {}
        return {key: entry["value"] for key, entry in stored.items()}

    def table(self, name: str) -> list[dict[str, Any]]:
        """All rows of the tables of this name."""
        contents = [content for _, contents in sorted(self.media.get(name, {}).items()) for content in contents]
        return [row for content in contents for row in json.loads(content)["rowData"]]

    def values(self, name: str) -> list[float]:
        """Values in the order of their steps."""
        return [value for _, value in sorted(self.scalars[name].items())]


def run_dirs(log_dir: Path) -> list[Path]:
    return sorted(log_dir.glob("run-*"))


def only_run(log_dir: Path) -> RunFile:
    """The one run under a log directory."""
    (directory,) = run_dirs(log_dir)
    return read_run(directory)


def ended_run(log_dir: Path, timeout: float = 150) -> RunFile:
    """The one run under a log directory, once its finish record is there."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        written = [file for directory in run_dirs(log_dir) for file in directory.glob("*.swanlab")]
        # SwanLab writes nothing before it has 8 KiB or is closed.
        if written and written[0].stat().st_size:
            run = only_run(log_dir)
            if run.state is not None:
                return run
        time.sleep(0.05)
    raise AssertionError(f"no run under {log_dir} ended within {timeout} s")


def read_run(directory: Path) -> RunFile:
    run = RunFile(directory)
    for record in _records(directory):
        match record.WhichOneof("record_type"):
            case "scalar":
                scalar = record.scalar
                steps = run.scalars.setdefault(scalar.key, {})
                assert scalar.step not in steps, f"{scalar.key} written twice at step {scalar.step}"
                steps[scalar.step] = scalar.value.number
                run.times.setdefault(scalar.key, {})[scalar.step] = scalar.timestamp.ToNanoseconds() / 1e9
            case "media":
                media = record.media
                kinds = media.DESCRIPTOR.fields_by_name["type"].enum_type.values_by_number
                kind = kinds[media.type].name.removeprefix("COLUMN_TYPE_").lower()
                contents = [(directory / "media" / kind / item.filename).read_text() for item in media.value.items]
                assert media.step not in run.media.setdefault(media.key, {})
                run.media[media.key][media.step] = contents
                captions = [item.caption for item in media.value.items]
                run.captions.setdefault(media.key, {})[media.step] = captions
            case "finish":
                state = record.finish.DESCRIPTOR.fields_by_name["state"].enum_type
                run.state = state.values_by_number[record.finish.state].name.removeprefix("RUN_STATE_").lower()
                run.error = record.finish.error
    return run


def _records(directory: Path) -> Iterator[Any]:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    (file,) = directory.glob("run-*.swanlab")
    reader = DataStoreReader()
    reader.open(file)
    try:
        for payload in reader:
            record = Record()
            record.ParseFromString(payload)
            yield record
    finally:
        reader.close()
