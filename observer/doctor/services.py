"""What lies outside: SwanLab's cloud, and the Lark bot."""

from __future__ import annotations

from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from time import time

import httpx

from swanlab_ray.actors.notify.cards import Message, Words, card
from swanlab_ray.actors.notify.outbox import Bot, Refused, Unavailable, open_bot
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.swanlab.experiment import CloudError, NoKey, log_in
from swanlab_ray.observer.doctor.finding import Finding

CLOCK_S = 30.0
"""By how much this machine's clock may differ from the cloud's."""
TIMEOUT_S = 10.0


def examine_cloud(settings: ObserverSettings, first_machine: bool) -> Iterator[Finding]:
    """Whether the cloud takes this machine's key. It is needed where rank 0 is."""
    if settings.mode != "cloud":
        yield Finding("ok", "SwanLab", f"mode {settings.mode}: its cloud is not asked")
        return
    try:
        account = log_in(settings)
    except NoKey as error:
        if first_machine:
            yield Finding("wrong", "SwanLab", str(error))
        else:
            yield Finding("ok", "SwanLab", "no API key here; that of rank 0's machine is used")
        return
    except CloudError as error:
        told = f"{error}: check SWANLAB_API_KEY, SWANLAB_API_HOST and the network; a run is kept on disk for sync"
        yield Finding("wrong", "SwanLab", told)
        return
    yield Finding("ok", "SwanLab", f"{account.api_host} accepts the API key")
    off = _clock_ahead(account.api_host)
    if off is not None and abs(off) > CLOCK_S:
        way = "ahead of" if off > 0 else "behind"
        told = f"this machine's clock is {abs(off):.0f} s {way} that of {account.api_host}: let NTP set it"
        yield Finding("wrong", "clock", told)


def _clock_ahead(host: str) -> float | None:
    """Seconds, to a second; None where the server does not tell."""
    try:
        headers = httpx.head(host, timeout=TIMEOUT_S).headers
        return time() - parsedate_to_datetime(headers["Date"]).timestamp() - float(headers.get("Age", 0))
    except Exception:  # whatever is between
        return None


def examine_lark(settings: ObserverSettings, send: bool) -> Iterator[Finding]:
    """Whether the bot takes a test message; that it is there, where none is to be sent."""
    bot = open_bot(settings)
    unsigned = "" if settings.lark_secret else ", unsigned: set SWANLAB_LARK_SECRET for production use"
    if bot is None:
        if send:
            yield Finding("wrong", "Lark", "set SWANLAB_LARK_WEBHOOK_URL to the webhook in the bot's settings")
    elif not send:
        yield Finding("ok", "Lark", f"a webhook is set{unsigned or ', with a secret'}; --lark sends a test message")
    else:
        yield _sent(bot, unsigned)


def _sent(bot: Bot, unsigned: str) -> Finding:
    title = Words("Notifications arrive", "通知测试成功")
    text = Words("A run with this webhook sends its notifications here.", "使用此 webhook 的训练会把通知发送到这里。")
    try:
        bot.send(card(Message("test", "test", title, "green", [], text, footer="SwanLab · swanlab-ray doctor")))
    except Refused as error:
        return Finding("wrong", "Lark", f"Lark refuses the message: {error}")
    except Unavailable as error:
        told = f"Lark does not take the message at present: {error}; check the address and the network, or try later"
        return Finding("wrong", "Lark", told)
    return Finding("ok", "Lark", f"the test message has arrived{unsigned}")
