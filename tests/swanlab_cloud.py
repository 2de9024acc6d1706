"""A stand-in for SwanLab's cloud: enough of its HTTP interface for the real client, with faults on demand.

State is kept as the server would: projects, experiments, and each experiment's points by series and step. Every answer
can be replaced by a fault, before or after what was asked for has been done.
"""

from __future__ import annotations

import csv
import io
import json
import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

from tests.stand_in import StandIn

KEY = "stand-in-key-4711"


@dataclass
class Fault:
    """What happens to requests whose ``METHOD /path`` matches.

    ``applied``: the request is carried out before the answer goes wrong. ``count`` requests are hit.
    """

    match: str
    status: int = 500
    count: int = 1
    applied: bool = False
    delay: float = 0.0


@dataclass
class Experiment:
    project: str
    created: str
    made: dict[str, Any]
    state: str = "RUNNING"
    opened: int = 1
    points: dict[str, dict[int, Any]] = field(default_factory=dict)
    times: dict[str, dict[int, str]] = field(default_factory=dict)
    repeated: int = 0
    """Points that were sent although they were there with the same value."""
    media: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    """Files of each series by step."""
    columns: set[str] = field(default_factory=set)
    profile: dict[str, Any] = field(default_factory=dict)
    logs: list[dict[str, Any]] = field(default_factory=list)


class SwanLabCloud(StandIn):
    """The server. ``with SwanLabCloud() as cloud`` runs it on a free port of this machine."""

    def __init__(self) -> None:
        super().__init__()
        self.projects: dict[str, dict[str, Any]] = {}
        self.experiments: dict[str, Experiment] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.files: dict[str, bytes] = {}
        self.dislikes: Callable[[str, int], bool] = lambda key, step: False
        """Further names and points that it refuses."""
        self.redirect: str | None = None
        """Another address, where it sends everybody."""
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """What a user would set to use this server."""
        return {"SWANLAB_API_KEY": KEY, "SWANLAB_API_HOST": self.url, "SWANLAB_WEB_HOST": self.url}

    def only(self) -> Experiment:
        """The one experiment there is."""
        (experiment,) = self.experiments.values()
        return experiment

    def tables(self, key: str) -> dict[int, list[dict[str, Any]]]:
        """The rows of the only experiment's tables under this name, by step."""
        (run,) = self.experiments
        return {
            step: [row for path in paths for row in json.loads(self.files[f"{run}/{path}"])["rowData"]]
            for step, paths in self.only().media.get(key, {}).items()
        }

    def fault_for(self, request: str) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.count > 0 and re.search(fault.match, request):
                    fault.count -= 1
                    return fault
        return None

    def answer(self, method: str, path: str, body: Any, headers: Any) -> tuple[int, Any]:
        """Carry out a request: status and JSON."""
        with self._lock:
            for pattern, handle in self._routes().items():
                if match := re.fullmatch(pattern, f"{method} {path}"):
                    return handle(body, headers, *match.groups())
        return 404, {"code": "404", "message": f"unhandled: {method} {path}"}

    def _routes(self) -> dict[str, Callable[..., tuple[int, Any]]]:
        return {
            r"POST /api/login/api_key": self._login,
            r"GET /api/project/([^/]+)/([^/]+)": self._project,
            r"POST /api/projects/([^/]+)": self._create_project,
            r"POST /api/project/([^/]+)/([^/]+)/experiment": self._experiment,
            r"GET /api/project/[^/]+/[^/]+/runs/([^/]+)": self._run,
            r"PUT /api/project/[^/]+/[^/]+/runs/([^/]+)/profile": self._profile,
            r"PUT /api/project/[^/]+/[^/]+/runs/([^/]+)/state": self._state,
            r"POST /api/projects/([^/]+/[^/]+)/series": self._series,
            r"POST /api/house/experiments/([^/]+)/heartbeat": lambda *_: (200, {}),
            r"POST /api/house/metrics": self._metrics,
            r"GET /api/house/metrics/summaries/[^/]+/([^/]+)": self._summary,
            r"POST /api/house/metrics/scalar/export": self._export,
            r"POST /api/files/presigned/get": self._presigned,
            r"POST /api/resources/presigned/put": self._resources,
        }

    def _login(self, body: Any, headers: Any) -> tuple[int, Any]:
        if headers.get("authorization") != KEY:
            return 401, {"code": "401", "message": "wrong key"}
        expires = (datetime.now(UTC) + timedelta(days=30)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return 200, {"sid": uuid.uuid4().hex, "expiredAt": expires, "userInfo": {"username": "tester", "name": "T"}}

    def _project(self, body: Any, headers: Any, user: str, name: str) -> tuple[int, Any]:
        project = self.projects.get(f"{user}/{name}")
        return (200, project) if project else (404, {"code": "404", "message": "no such project"})

    def _create_project(self, body: Any, headers: Any, user: str) -> tuple[int, Any]:
        place = f"{user}/{body['name']}"
        self.projects.setdefault(
            place,
            {
                "cuid": f"project-{len(self.projects)}",
                "name": body["name"],
                "version": 1,
                "path": f"/{place}",
                "visibility": body["visibility"],
                "group": {"username": user},
                "_count": {"experiments": 0, "contributors": 1, "collaborators": 0, "clones": 0},
            },
        )
        return 201, {}

    def _experiment(self, body: Any, headers: Any, user: str, project: str) -> tuple[int, Any]:
        known = self.experiments.get(body["cuid"])
        answer = {"cuid": body["cuid"], "slug": body["cuid"], "name": body["name"]}
        if known is not None:
            known.state, known.opened = "RUNNING", known.opened + 1
            return 200, answer | {"createdAt": known.created}
        self.experiments[body["cuid"]] = Experiment(f"{user}/{project}", body["createdAt"], body)
        return 201, answer

    def _run(self, body: Any, headers: Any, run: str) -> tuple[int, Any]:
        known = self.experiments.get(run)
        return (200, {"cuid": run, "createdAt": known.created}) if known else (404, {"message": "no such run"})

    def _profile(self, body: Any, headers: Any, run: str) -> tuple[int, Any]:
        self.experiments[run].profile.update(body)
        return 200, {}

    def _state(self, body: Any, headers: Any, run: str) -> tuple[int, Any]:
        self.experiments[run].state = body["state"]
        return 200, {}

    def _series(self, body: Any, headers: Any, project: str) -> tuple[int, Any]:
        for column in body["series"]:
            if self.refuses(column["key"]):
                return 422, {"code": "422", "message": "invalid key"}
        for experiment in self.experiments.values():
            if experiment.project == project:
                experiment.columns.update(column["key"] for column in body["series"])
        return 200, {}

    def _metrics(self, body: Any, headers: Any) -> tuple[int, Any]:
        experiment = self.experiments[body["experimentId"]]
        if body["type"] != "log" and any(self.refuses(metric["key"], metric["index"]) for metric in body["metrics"]):
            return 422, {"code": "422", "message": "invalid metric"}
        for metric in body["metrics"]:
            if body["type"] == "log":
                experiment.logs.append(metric)
                continue
            kept: dict[str, dict[int, Any]] = experiment.media if body["type"] == "media" else experiment.points
            points = kept.setdefault(metric["key"], {})
            if points.get(metric["index"]) == metric["data"]:
                experiment.repeated += 1
            points[metric["index"]] = metric["data"]
            experiment.times.setdefault(metric["key"], {})[metric["index"]] = metric["create_time"]
        return 201, {}

    def refuses(self, key: str, step: int = 0) -> bool:
        """Whether a series cannot have this name, or no point this step: by SwanLab's own rules and a test's."""
        valid = 0 < len(key) <= 512 and key == key.strip() and key[0] not in "./" and key[-1] not in "./"
        return not valid or re.search(r"[\x00-\x1f\x7f]", key) is not None or step > 1 << 48 or self.dislikes(key, step)

    def _summary(self, body: Any, headers: Any, run: str) -> tuple[int, Any]:
        experiment = self.experiments[run]
        scalars = [{"key": key, "step": max(points)} for key, points in experiment.points.items()]
        logs = [{"key": "LOG", "step": len(experiment.logs)}] if experiment.logs else []
        media = [{"key": key, "step": max(steps)} for key, steps in experiment.media.items()]
        return 200, {"log": logs, "media": media, "scalar": scalars}

    def _export(self, body: Any, headers: Any) -> tuple[int, Any]:
        keys = [column["key"] for column in body["columns"]]
        experiment = self.experiments[body["columns"][0]["experimentId"]]
        steps = sorted({step for key in keys for step in experiment.points.get(key, {})})
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["step", *(f"e-{key}_{what}" for key in keys for what in ("step", "timestamp"))])
        for step in steps:
            row: list[Any] = [step]
            for key in keys:
                there = step in experiment.points.get(key, {})
                row += [experiment.points[key][step], 1] if there else ["", ""]
            writer.writerow(row)
        path = f"export/{uuid.uuid4().hex}.csv"
        self.files[path] = table.getvalue().encode()
        return 200, {"cosKey": path}

    def _presigned(self, body: Any, headers: Any) -> tuple[int, Any]:
        return 200, {"urls": [f"{self.url}/_file/{path}" for path in body["paths"]]}

    def _resources(self, body: Any, headers: Any) -> tuple[int, Any]:
        return 200, {"urls": [f"{self.url}/_file/{body['experimentId']}/{path}" for path in body["paths"]]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: SwanLabCloud

    def log_message(self, format: str, *arguments: Any) -> None: ...

    def _serve(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        cloud = self.server_state
        if path.startswith("/_file/"):
            if self.command == "PUT":
                cloud.files[path.removeprefix("/_file/")] = raw
                return self._reply(200, b"")
            return self._reply(200, cloud.files[path.removeprefix("/_file/")])
        if cloud.redirect:
            self.send_response(307)
            self.send_header("Location", cloud.redirect + self.path)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = json.loads(raw) if raw else None
        fault = cloud.fault_for(f"{self.command} {path}")
        if fault is not None:
            time.sleep(fault.delay)
            if fault.applied:
                cloud.answer(self.command, path, body, self.headers)
            if fault.status:
                return self._reply(fault.status, json.dumps({"code": "x", "message": "injected"}).encode())
        status, answer = cloud.answer(self.command, path, body, self.headers)
        return self._reply(status, json.dumps(answer).encode())

    def _reply(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _serve


SwanLabCloud.handler = _Handler
