"""What a notification looks like: a card of Lark (Feishu), which shows itself in its reader's language."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from urllib.parse import quote

from swanlab_ray.actors.wire.text import harmless, one_line

BYTES = 19_500
"""Of a card; a group takes messages of 20,000, with the signature."""
PART_BYTES = 6_000
"""Of each of its texts, in one language: nobody reads more on a telephone."""
LINK_BYTES = 2_000
CUT = " […] "
"""Stands where something was cut out."""
LONGEST_LETTER = 16
"""Characters of what people see as one."""
_JOINER = "\u200d"
_MARKUP = re.compile(r"[&<>*_~`\[\]\\]")


class Words(NamedTuple):
    """A text in both languages."""

    en: str
    zh: str


def same(text: str) -> Words:
    """A text that is the same in both, such as a name or an exception."""
    return Words(text, text)


@dataclass(frozen=True, slots=True)
class Message:
    """A notification.

    Args:
        key: identifies it.
        topic: what it is about; while one waits to be sent, another on its topic replaces it.
        color: of the card's head: ``blue``, ``green``, ``red``, ``orange`` or ``grey``.
        facts: pairs of a label and a value.
        text: a sentence or two below them.
        code: lines shown as they are, such as the end of a traceback.
        link: address of a page of the run.
    """

    key: str
    topic: str
    title: Words
    color: str
    facts: list[tuple[Words, str]]
    text: Words | None = None
    code: str = ""
    link: str | None = None
    footer: str = ""


def card(message: Message, times: int = 1) -> dict[str, Any]:
    """The card of a message that came so many times. Its long parts are cut, so that a group takes it."""
    most = PART_BYTES
    while len(encoded(made := _card(_shortened(message, most), times))) > BYTES:
        most = most * 3 // 4
    return made


def encoded(message: dict[str, Any]) -> bytes:
    """The bytes that are sent."""
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _shortened(message: Message, most: int) -> Message:
    """A message of which no part has more than so many bytes, and nothing steers its reader's screen."""

    def line(text: str) -> str:
        return _cut(one_line(text), most)

    return replace(
        message,
        title=Words(*map(line, message.title)),
        facts=[(label, line(value)) for label, value in message.facts],
        text=Words(*(_cut(harmless(text), most) for text in message.text)) if message.text else None,
        code=_cut_out(harmless(message.code), most),
        link=_address(message.link),
        footer=line(message.footer),
    )


def _cut(text: str, most: int) -> str:
    """The beginning of a text, where it has more bytes than that. What people see as one letter stays whole."""
    if _fits(text, most):
        return text
    kept = text[:most].encode()[: max(0, most - len(CUT.encode()))].decode(errors="ignore")
    return text[: _between_letters(text, len(kept), -1)] + CUT


def _cut_out(text: str, most: int) -> str:
    """A text without its middle: of a traceback both ends count."""
    if _fits(text, most):
        return text
    half = most // 2
    rest = text[-half:].encode()[-half:].decode(errors="ignore") if half else ""
    return _cut(text, half) + text[_between_letters(text, len(text) - len(rest), 1) :]


def _fits(text: str, most: int) -> bool:
    return len(text) <= most and len(text.encode()) <= most


def _between_letters(text: str, at: int, direction: int) -> int:
    """The nearest place in a direction that is not within a letter; a heap of accents is no letter."""
    for place in range(at, at + direction * LONGEST_LETTER, direction):
        if not 0 < place < len(text) or not (_joins(text[place]) or text[place - 1] == _JOINER):
            return place
    return at


def _joins(letter: str) -> bool:
    """Whether a character belongs to the one before: an accent, a joiner, a selector, a colour of skin."""
    return letter == _JOINER or unicodedata.category(letter).startswith("M") or "\U0001f3fb" <= letter <= "\U0001f3ff"


def _address(link: str | None) -> str | None:
    """A link that a button takes; None where this is none."""
    if link is None or not link.startswith(("http://", "https://")):
        return None
    quoted = quote(link, safe="%/:=&?~#+!$,;'@()*[]", errors="replace")
    return quoted if len(quoted) <= LINK_BYTES else None


def _card(message: Message, times: int) -> dict[str, Any]:
    repeated = f" ×{times}" if times > 1 else ""
    return {
        "config": {"wide_screen_mode": True},
        "header": {
            "template": message.color,
            "title": {
                "tag": "plain_text",
                "content": message.title.en + repeated,
                "i18n": {"en_us": message.title.en + repeated, "zh_cn": message.title.zh + repeated},
            },
        },
        "i18n_elements": {"en_us": _elements(message, 0), "zh_cn": _elements(message, 1)},
    }


def _elements(message: Message, language: int) -> list[dict[str, Any]]:
    elements: list[dict[str, Any]] = []
    if message.facts:
        fields = [
            {
                "is_short": len(value) < 30,
                "text": {"tag": "lark_md", "content": f"**{label[language]}**\n{plain(value)}"},
            }
            for label, value in message.facts
        ]
        elements.append({"tag": "div", "fields": fields})
    for text in (message.text[language] if message.text else "", message.code):
        if text:
            elements.append({"tag": "div", "text": {"tag": "plain_text", "content": text}})
    if message.link:
        button = Words("Open in SwanLab", "在 SwanLab 中查看")[language]
        elements.append(
            {
                "tag": "action",
                "actions": [
                    {
                        "tag": "button",
                        "type": "primary",
                        "text": {"tag": "plain_text", "content": button},
                        "url": message.link,
                    }
                ],
            }
        )
    if message.footer:
        elements.append({"tag": "note", "elements": [{"tag": "plain_text", "content": message.footer}]})
    return elements


def plain(text: str) -> str:
    """A text of somebody else's, which must not become markup: an experiment called ``<at id=all>`` pings nobody."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)
