"""The webhook of a Lark (Feishu) custom bot: sends one card, and says what the bot made of it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import re
import time
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from swanlab_ray.actors.notify.cards import encoded
from swanlab_ray.actors.notify.outbox import Refused, Unavailable
from swanlab_ray.actors.notify.proxies import proxy_for
from swanlab_ray.actors.wire.text import one_line

TIMEOUT_S = 10.0
LONGEST_WAIT_S = 600.0
"""What is waited at the most where the bot asks to wait."""
KEYWORD = "SwanLab"
"""Every card has it, for bots that ask for a keyword."""
BAD_SIGNATURE = 19021
_EXPLAINED = {
    19001: "the token in the webhook's URL is wrong: copy the URL from the bot's settings again",
    BAD_SIGNATURE: "the signature is wrong: check swanlab_lark_secret, and the clock of the writer's machine",
    19022: "this machine's address is not among those that the bot allows",
    19024: f"the bot asks for a keyword that the message lacks: add '{KEYWORD}' to its keywords",
}
_TOO_MANY = re.compile("too many|frequency", re.I)

# It would log each request with its URL, and whoever has that can write to the group.
logging.getLogger("httpx").setLevel(logging.WARNING)
logging.getLogger("httpcore").setLevel(logging.WARNING)


class LarkBot:
    """A custom bot in a group.

    Args:
        url: its webhook.
        secret: what messages are signed with, if its settings ask for that.
    """

    def __init__(self, url: str, secret: str | None) -> None:
        self._url = url
        self._secret = secret

    def send(self, card: dict[str, Any]) -> None:
        """Send a card, and wait for the answer.

        Raises:
            Refused: it will not be taken.
            Unavailable: it may be taken later.
        """
        message: dict[str, Any] = {"msg_type": "interactive", "card": card}
        if self._secret is not None:
            timestamp = str(int(time.time()))
            message |= {"timestamp": timestamp, "sign": sign(timestamp, self._secret)}
        try:  # the texts of what is raised may hold the URL, or a proxy's password
            response = self._post(encoded(message))
        except httpx.HTTPError as error:
            raise Unavailable(type(error).__name__) from None
        except ImportError:
            raise Refused("the proxy is a SOCKS proxy: pip install 'httpx[socks]' where the writer runs") from None
        except Exception as error:
            raise Refused(f"{type(error).__name__}: check the proxy and certificate variables") from None
        if response.status_code == 429 or response.status_code >= 500:
            raise Unavailable(f"HTTP {response.status_code}", _seconds(response.headers.get("Retry-After", "")))
        self._check(response)

    def _post(self, body: bytes) -> httpx.Response:
        proxy = proxy_for(self._url)
        transport = httpx.HTTPTransport(proxy=httpx.Proxy(proxy) if proxy else None)
        with httpx.Client(transport=transport, timeout=TIMEOUT_S) as client:
            return client.post(self._url, content=body, headers={"Content-Type": "application/json; charset=utf-8"})

    def _check(self, response: httpx.Response) -> None:
        """Errors come as HTTP 200 with a code; other answers are not from a bot."""
        try:
            answer = response.json()
            code = answer.get("code", answer.get("StatusCode"))
        except (ValueError, AttributeError):
            code = None
        if code == 0 and response.is_success:
            return
        if not isinstance(code, int):
            raise Refused(
                f"the answer (HTTP {response.status_code}) is not that of a Lark bot: check the webhook's URL"
            )
        said = str(answer.get("msg") or answer.get("StatusMessage") or "no reason given")
        text = one_line(self._without_secrets(said))[:200]
        if _TOO_MANY.search(text):
            raise Unavailable(f"code {code}, {text}")
        if code == BAD_SIGNATURE and self._secret is None:
            raise Refused("the bot asks for signed messages: set swanlab_lark_secret to the secret in its settings")
        raise Refused(_EXPLAINED.get(code, f"code {code}, {text}"))

    def _without_secrets(self, text: str) -> str:
        """Somebody else's text may repeat what it was sent."""
        for secret in (self._url, self._url.rstrip("/").rpartition("/")[2], self._secret):
            text = text.replace(secret, "***") if secret else text
        return text


def _seconds(retry_after: str) -> float:
    """How long a server asks to wait, as a number or as a date; 0 where that cannot be understood."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(seconds, LONGEST_WAIT_S) if seconds > 0 else 0.0


def sign(timestamp: str, secret: str) -> str:
    """The signature of a message: HMAC-SHA256 of nothing, under a key of both. ``timestamp``: Unix seconds."""
    return base64.b64encode(hmac.digest(f"{timestamp}\n{secret}".encode(), b"", hashlib.sha256)).decode()
