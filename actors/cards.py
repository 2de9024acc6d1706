"""What a notification looks like: a card of Lark (Feishu), which shows itself in its reader's language."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    """The card of a message that came so many times."""
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
