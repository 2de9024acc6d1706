"""A stand-in for a group's bot: checks tokens, signatures and limits as the real one does, with faults on demand."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.stand_in import StandIn

TOKEN = "t0ken-of-the-hook"
SECRET = "s3cret-of-the-bot"
MOST_BYTES = 20_000
"""Of a message as it is sent."""


@dataclass
class Fault:
    """What the next ``count`` requests get instead of an answer of the bot's."""

    status: int = 200
    body: str = "{}"
    count: int = 1
    delay: float = 0.0
    retry_after: str = ""


class LarkGroup(StandIn):
    """A group with a bot. ``with LarkGroup() as group`` serves it on a free port of this machine.

    Args:
        secret: what messages must be signed with; None: unsigned ones are taken.
        keyword: what each message must hold.
    """

    def __init__(self, secret: str | None = SECRET, keyword: str = "") -> None:
        super().__init__()
        self.secret = secret
        self.keyword = keyword
        self.cards: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.requests = 0
        self.faults: list[Fault] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/open-apis/bot/v2/hook/{TOKEN}"

    def environment(self) -> dict[str, str]:
        """What a user would set."""
        secret = {"SWANLAB_LARK_SECRET": self.secret} if self.secret else {}
        return {"SWANLAB_LARK_WEBHOOK_URL": self.url} | secret

    def titles(self) -> list[str]:
        """Titles of the cards, without what follows the middle dot."""
        return [title(card).partition(" · ")[0] for card in self.cards]

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """As the bot answers: always HTTP 200."""
        message: dict[str, Any] = json.loads(body)
        if path != f"/open-apis/bot/v2/hook/{TOKEN}":
            return {"code": 19001, "msg": "param invalid: incoming webhook access token invalid"}
        if self.secret is not None:
            timestamp = str(message.get("timestamp", ""))
            expected = base64.b64encode(
                hmac.new(f"{timestamp}\n{self.secret}".encode(), b"", hashlib.sha256).digest()
            ).decode()
            fresh = timestamp.isdigit() and abs(time.time() - int(timestamp)) < 3600
            if not fresh or message.get("sign") != expected:
                return {"code": 19021, "msg": "sign match fail or timestamp is not within one hour from current time"}
        if len(body) > MOST_BYTES:
            return {"code": 9499, "msg": "Bad Request"}
        if self.keyword not in json.dumps(message, ensure_ascii=False):
            return {"code": 19024, "msg": "Key Words Not Found"}
        now = time.monotonic()
        if sum(now - sent < 1.0 for sent in self.times) >= 5:
            return {"code": 11232, "msg": "frequency limited psm[lark.oapi.app_platform_runtime]appID[1500]"}
        self.times.append(now)
        self.cards.append(message["card"])
        return {"code": 0, "msg": "success", "data": {}, "StatusCode": 0, "StatusMessage": "success"}


def title(card: dict[str, Any], language: str = "en_us") -> str:
    text: str = card["header"]["title"]["i18n"][language]
    return text


def texts(card: dict[str, Any], language: str = "en_us") -> str:
    """Everything that a reader sees below the title."""

    def found(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if "content" in node:
                yield node["content"]
            for value in node.values():
                yield from found(value)
        elif isinstance(node, list):
            for value in node:
                yield from found(value)

    return "\n".join(found(card["i18n_elements"][language]))


class _Handler(BaseHTTPRequestHandler):
    server_state: LarkGroup

    def log_message(self, *args: Any) -> None: ...

    def do_POST(self) -> None:
        group = self.server_state
        body = self.rfile.read(int(self.headers["Content-Length"]))
        group.requests += 1
        fault = next((fault for fault in group.faults if fault.count > 0), None)
        if fault is None:
            self._send(200, json.dumps(group.answer(self.path, body)))
            return
        fault.count -= 1
        threading.Event().wait(fault.delay)
        self._send(fault.status, fault.body, fault.retry_after)

    def _send(self, status: int, body: str, retry_after: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body.encode())))
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(body.encode())


LarkGroup.handler = _Handler
