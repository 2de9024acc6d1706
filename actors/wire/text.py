"""Texts of somebody else's on their way to people: nothing in them moves a cursor, turns a line around, or hides."""

from __future__ import annotations

_REPLACEMENT = 0xFFFD
_CONTROLS: dict[int, int] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
# Further control characters, those that turn the direction of text, and halves of characters, which are no Unicode.
_CONTROLS |= dict.fromkeys(
    [*range(128, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)], _REPLACEMENT
)
_MARKS = dict.fromkeys([0x061C, 0x200E, 0x200F, 0x2028, 0x2029], _REPLACEMENT)
_IN_A_LINE = _CONTROLS | _MARKS | {ord("\n"): 0x240A, ord("\t"): 0x2409}


def harmless(text: str) -> str:
    """Text that no terminal takes for anything else: control characters become their symbols. Lines stay lines."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)


def one_line(text: str) -> str:
    """The same for a name, an error or a host, which stand in one line."""
    return text if text.isascii() and text.isprintable() else text.translate(_IN_A_LINE)


def first_line(text: str) -> str:
    """The first line that says something, of an error for instance; empty where there is none."""
    return next((line for line in text.splitlines() if line.strip()), "")


def brief(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def many(number: int, noun: str) -> str:
    """Such as ``1 event`` and ``2 events``."""
    return f"{number} {noun}{'s' * (number != 1)}"
