"""Cards on their way to the bot: at the pace it allows, again while it is away, and never in anybody's way."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from swanlab_ray.actors.notify.cards import Message, card
from swanlab_ray.actors.settings import ObserverSettings

LIMITS = ((5, 1.2), (100, 62.0))
"""Messages within so many seconds: a group takes 5 from a bot within 1 s and 100 within 60 s."""
RETRY_S = (1.0, 60.0)
"""Seconds between two attempts: the first pause, and the longest."""
CAPACITY = 100
"""Messages that may wait; the oldest go first."""


class Refused(Exception):
    """The bot does not take this message, now or later. The text says why, without any secret."""


class Unavailable(Exception):
    """The bot cannot be reached or asks to wait: the same message may pass later.

    Args:
        reason: for the user, without any secret.
        wait: seconds that it asks to wait, if it does.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Bot(Protocol):
    """What takes cards."""

    def send(self, card: dict[str, Any]) -> None:
        """Send a card; raises :class:`Refused` or :class:`Unavailable`."""


@dataclass(slots=True)
class _Letter:
    message: Message
    times: int = 1


class Mailbox:
    """Sends messages one after another from a thread of its own.

    Args:
        bot: takes them.
        notice: takes a sentence for the user.
        sent: is told the key of every message that has arrived.
    """

    def __init__(self, bot: Bot, notice: Callable[[str], None], sent: Callable[[str], None]) -> None:
        self._bot = bot
        self._notice = notice
        self._told_sent = sent
        self._letters: deque[_Letter] = deque()
        self._sending: _Letter | None = None
        self._sent: deque[float] = deque(maxlen=max(count for count, _ in LIMITS))
        self._changed = threading.Condition()
        self._closing = self._given_up = False
        self._away = False
        self._thread: threading.Thread | None = None
        self._stuck = False

    def post(self, message: Message) -> None:
        """Queue a message. Never blocks or raises. What waits on the same topic already is replaced, and counted."""
        self._start()
        with self._changed:
            for letter in self._letters:
                if letter.message.topic == message.topic:
                    letter.message = message
                    letter.times += 1
                    return
            if len(self._letters) >= CAPACITY:
                self._letters.popleft()
            self._letters.append(_Letter(message))
            self._changed.notify()

    def close(self, timeout: float) -> int:
        """Send what waits for at most so many seconds; how many messages are left over then."""
        if self._letters:
            self._start()
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout)
        with self._changed:
            self._given_up = True
            return len(self._letters) + (self._sending is not None)

    def _start(self) -> None:
        """Start the thread that sends, if it could not be started so far: a machine may have no more of them."""
        with self._changed:
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._work, name="lark", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                reason = None if self._stuck else str(error)
                self._stuck = True
            else:
                self._thread, reason = thread, None
        if reason is not None:
            self._tell(f"Lark notifications wait: {reason}.")

    def _work(self) -> None:
        pause = RETRY_S[0]
        while True:
            with self._changed:
                self._sending = None
                while not self._letters and not self._closing:
                    self._changed.wait()
                if not self._letters or self._given_up:
                    return
                self._sending = letter = self._letters.popleft()
            time.sleep(self._pace())
            try:
                self._bot.send(card(letter.message, letter.times))
            except Unavailable as error:
                if not self._away:
                    self._away = True
                    self._tell(f"Lark does not take notifications at present ({error}); they wait.")
                self._put_back(letter, max(error.wait, pause))
                pause = min(2 * pause, RETRY_S[1])
                continue
            except Refused as error:
                self._tell(f"Lark refuses a notification: {error}.")
            except Exception as error:
                self._tell(f"A notification could not be sent: {type(error).__name__}.")
            else:
                self._away = False
                with suppress(Exception):  # nobody else sends what waits
                    self._told_sent(letter.message.key)
            pause = RETRY_S[0]

    def _tell(self, sentence: str) -> None:
        with suppress(Exception):
            self._notice(sentence)

    def _put_back(self, letter: _Letter, pause: float) -> None:
        """Keep a letter for later, and wait so many seconds; not so many once the run has ended."""
        with self._changed:
            newer = next((one for one in self._letters if one.message.topic == letter.message.topic), None)
            if newer is not None:
                newer.times += letter.times
            else:
                self._letters.appendleft(letter)
            self._sending = None
            ended = self._closing or self._changed.wait_for(lambda: self._closing, pause)
        if ended:
            time.sleep(RETRY_S[0])

    def _pace(self) -> float:
        """Seconds to wait before the next message, which counts as sent then."""
        now = time.monotonic()
        wait = 0.0
        for count, seconds in LIMITS:
            if len(self._sent) >= count:
                wait = max(wait, self._sent[-count] + seconds - now)
        self._sent.append(now + wait)
        return wait


def open_bot(settings: ObserverSettings) -> Bot | None:
    """The bot that the settings name, if they name one."""
    if settings.lark_webhook_url is None:
        return None
    from swanlab_ray.actors.notify.lark import LarkBot  # it brings httpx, which nothing else here needs

    secret = settings.lark_secret.get_secret_value() if settings.lark_secret else None
    return LarkBot(settings.lark_webhook_url.get_secret_value(), secret)


def open_mailbox(
    settings: ObserverSettings, notice: Callable[[str], None], sent: Callable[[str], None]
) -> Mailbox | None:
    """The mailbox of the bot that the settings name, if they name one. Arguments as for :class:`Mailbox`."""
    bot = open_bot(settings)
    return None if bot is None else Mailbox(bot, notice, sent)
