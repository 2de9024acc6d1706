"""The Lark bot and what lies on its way to it, against a stand-in that checks what the real one checks."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from swanlab_ray.actors.notify import lark as lark_module
from swanlab_ray.actors.notify import outbox as mailbox_module
from swanlab_ray.actors.notify.cards import CUT, Message, Words, card, encoded, same
from swanlab_ray.actors.notify.lark import LarkBot
from swanlab_ray.actors.notify.outbox import Mailbox, Refused, Unavailable
from swanlab_ray.actors.notify.proxies import proxy_for
from swanlab_ray.actors.settings import ObserverSettings, SettingsError
from tests.conftest import wait_until
from tests.lark_bot import SECRET, TOKEN, Fault, LarkGroup, texts, title


def message(key: str = "k", **more: Any) -> Message:
    return Message(
        key, key, Words("A title", "标题"), "blue", [(Words("Loss", "损失"), "0.5")], footer="SwanLab", **more
    )


@pytest.fixture
def group() -> Iterator[LarkGroup]:
    with LarkGroup(keyword="SwanLab") as group:
        yield group


@pytest.mark.parametrize("secret", [SECRET, None])
def test_a_card_arrives_signed_and_unsigned(secret: str | None) -> None:
    with LarkGroup(secret) as group:
        LarkBot(group.url, secret).send(card(message(link="https://swanlab.cn/x", code="line 1\nline 2"), times=3))
        (got,) = group.cards
    assert (title(got), title(got, "zh_cn")) == ("A title ×3", "标题 ×3")
    assert texts(got).splitlines()[:2] == ["**Loss**", "0.5"]
    assert "**损失**" in texts(got, "zh_cn")
    assert "line 1\nline 2" in texts(got)
    assert got["i18n_elements"]["en_us"][-2]["actions"][0]["url"] == "https://swanlab.cn/x"


def test_what_users_write_becomes_no_markup() -> None:
    made = card(Message("k", "k", same("t"), "blue", [(same("Experiment"), "<at id=all></at> **x** [a](b)")]))
    (text,) = [field["text"]["content"] for field in made["i18n_elements"]["en_us"][0]["fields"]]
    assert not set("<>[]") & set(text)
    assert text.count("*") == 4  # of the label


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (Fault(body='{"code": 19021, "msg": "sign match fail"}'), Refused, "check swanlab_lark_secret"),
        (Fault(body='{"code": 19024, "msg": "Key Words Not Found"}'), Refused, "add 'SwanLab' to its keywords"),
        (Fault(body='{"code": 19001, "msg": "invalid"}'), Refused, "copy the URL from the bot's settings again"),
        (Fault(body='{"code": 19022, "msg": "Ip Not Allowed"}'), Refused, "not among those that the bot allows"),
        (Fault(body='{"code": 4242, "msg": "something new"}'), Refused, "code 4242, something new"),
        (Fault(body="<html>"), Refused, "is not that of a Lark bot"),
        (Fault(body="[1]"), Refused, "is not that of a Lark bot"),
        (Fault(404, "not found"), Refused, r"\(HTTP 404\) is not that of a Lark bot"),
        (Fault(body='{"code": 11232, "msg": "frequency limited"}'), Unavailable, "frequency limited"),
        (Fault(body='{"code": 9499, "msg": "too many request"}'), Unavailable, "too many"),
        (Fault(429, retry_after="7"), Unavailable, "HTTP 429"),
        (Fault(503), Unavailable, "HTTP 503"),
    ],
    ids=lambda value: f"{value.status} {value.body[:16]}" if isinstance(value, Fault) else "",
)
def test_answers_are_understood(group: LarkGroup, answer: Fault, kind: type[Exception], said: str) -> None:
    group.faults.append(answer)
    with pytest.raises(kind, match=said) as caught:
        LarkBot(group.url, SECRET).send(card(message()))
    assert TOKEN not in str(caught.value)
    if isinstance(caught.value, Unavailable):
        assert caught.value.wait == (7.0 if answer.retry_after else 0.0)


def test_success_of_the_older_kind(group: LarkGroup) -> None:
    group.faults.append(Fault(body='{"StatusCode": 0, "StatusMessage": "success"}'))
    LarkBot(group.url, SECRET).send(card(message()))


def test_a_wrong_proxy_is_no_crash(group: LarkGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks://user:s3cret@127.0.0.1:1")
    with pytest.raises(Refused, match="check the proxy and certificate variables") as caught:
        LarkBot(group.url, SECRET).send(card(message()))
    assert "s3cret" not in str(caught.value)


def test_nobody_there_and_too_slow(group: LarkGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lark_module, "TIMEOUT_S", 0.1)
    group.faults.append(Fault(delay=2.0))
    with pytest.raises(Unavailable, match=r"^ReadTimeout$"):
        LarkBot(group.url, SECRET).send(card(message()))
    group.stop()
    with pytest.raises(Unavailable, match=r"^ConnectError$"):
        LarkBot(group.url, SECRET).send(card(message()))


class Posted:
    """A mailbox, with what it said."""

    def __init__(self, group: LarkGroup, secret: str | None = SECRET) -> None:
        self.notices: list[str] = []
        self.sent: list[str] = []
        self.mailbox = Mailbox(LarkBot(group.url, secret), self.notices.append, self.sent.append)


@pytest.fixture
def posted(group: LarkGroup, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Posted]:
    monkeypatch.setattr(mailbox_module, "RETRY_S", (0.01, 0.05))
    return lambda secret=SECRET: Posted(group, secret)


class Clock:
    """Time that passes only where somebody sleeps."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_the_bot_s_pace_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than 5 in a second or 100 in a minute, and no slower than that."""
    clock = Clock()
    times: list[float] = []

    class Timed:
        def send(self, card: dict[str, Any]) -> None:
            times.append(clock.now)

    monkeypatch.setattr(mailbox_module, "time", clock)
    monkeypatch.setattr(mailbox_module, "CAPACITY", 1000)
    mailbox = Mailbox(Timed(), print, lambda key: None)
    for number in range(250):
        mailbox.post(message(f"k{number}"))
    assert mailbox.close(60) == 0
    assert len(times) == 250
    for count, seconds in ((5, 1.0), (100, 60.0)):
        assert all(later - earlier >= seconds for earlier, later in zip(times, times[count:], strict=False))
    assert times[-1] < 140


def test_an_outage_is_said_once_and_everything_arrives(group: LarkGroup, posted: Callable[..., Posted]) -> None:
    group.stop()
    ours = posted()
    ours.mailbox.post(message("a"))
    wait_until(lambda: bool(ours.notices))
    ours.mailbox.post(message("b"))
    group.faults += [Fault(500, count=2), Fault(429), Fault(body='{"code": 11232, "msg": "frequency limited"}')]
    group.start()
    wait_until(lambda: len(ours.sent) == 2)
    assert ours.sent == ["a", "b"]
    assert ours.notices == ["Lark does not take notifications at present (ConnectError); they wait."]


def test_a_dead_webhook_is_one_warning_and_the_end_does_not_wait_for_it(
    group: LarkGroup, posted: Callable[..., Posted]
) -> None:
    ours = posted("another secret")
    for number in range(3):
        ours.mailbox.post(message(f"k{number}"))
    assert ours.mailbox.close(60) == 0
    assert set(ours.notices) == {
        "Lark refuses a notification: the signature is wrong: check swanlab_lark_secret, and the clock of the "
        "writer's machine."
    }
    assert ours.sent == []
    group.stop()
    away = posted()
    away.mailbox.post(message())
    assert away.mailbox.close(0.2) == 1


def test_what_repeats_while_it_waits_is_one_card(group: LarkGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()

    class Slow(LarkBot):
        def send(self, card: dict[str, Any]) -> None:
            goes_on.wait()
            super().send(card)

    mailbox = Mailbox(Slow(group.url, SECRET), print, print)
    mailbox.post(message("first"))
    for number in range(4):
        mailbox.post(message("same", code=str(number)))
    goes_on.set()
    assert mailbox.close(30) == 0
    assert [title(card) for card in group.cards] == ["A title", "A title ×4"]
    assert "\n3" in texts(group.cards[1])


@pytest.mark.parametrize("text", ["训练", "🔥", "👩\u200d👩\u200d👧", "<&>", "\0\x1b[31m", "e\u0301" * 3, "\n", '\\"'])
@pytest.mark.parametrize("size", [60, 2_000, 20_000])
def test_a_card_of_any_text_is_taken(group: LarkGroup, text: str, size: int) -> None:
    """A group counts bytes; what is too much is cut with a mark, between letters, and the title stays."""
    long = text * size
    words = Words(long, long)
    facts = [(Words("Experiment", "实验"), long), (Words("Loss", "损失"), "0.5")]
    LarkBot(group.url, SECRET).send(card(Message("k", "k", words, "red", facts, words, long, footer="SwanLab")))
    (got,) = group.cards
    assert (CUT in texts(got)) == (len(long.encode()) > 1500)
    assert title(got)
    assert "**Loss**\n0.5" in texts(got)
    assert not set("\0\x1b\ufffd") & set(json.dumps(got, ensure_ascii=False))
    for shown in (title(got), texts(got, "zh_cn")):
        assert not re.search(f"\u200d{re.escape(CUT)}|{re.escape(CUT)}[\u200d\u0301]", shown)


def test_a_long_traceback_keeps_both_ends() -> None:
    made = card(message(code="first\n" + "训练\n" * 9000 + "last"))
    shown = texts(made)
    assert shown.index("first") < shown.index(CUT) < shown.index("\nlast")
    assert len(encoded(made)) > 2 * 5_900, "it stands there in two languages"


@pytest.mark.parametrize(
    ("url", "link"),
    [
        ("https://swanlab.cn/@me/p/runs/a[1]", "https://swanlab.cn/@me/p/runs/a[1]"),
        ("https://swanlab.cn/项目 x", "https://swanlab.cn/%E9%A1%B9%E7%9B%AE%20x"),
        ("javascript:alert(1)", None),
        ("https://swanlab.cn/" + "x" * 5000, None),
    ],
)
def test_a_button_has_an_address_or_there_is_none(url: str, link: str | None) -> None:
    made = card(message(link=url))
    found = [one["actions"][0]["url"] for one in made["i18n_elements"]["en_us"] if one["tag"] == "action"]
    assert found == ([link] if link else [])


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "entry", ["localhost,fd07::/64", "[::1]", "::1,[fe80::]/10", "127.0.0.0/8,]x[", ":, ,/,*.,:99"]
)
@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_a_card_is_sent_whatever_no_proxy_says(
    group: LarkGroup, no_proxies: pytest.MonkeyPatch, name: str, entry: str
) -> None:
    no_proxies.setenv(name, entry)
    LarkBot(group.url, SECRET).send(card(message()))
    assert group.titles() == ["A title"]


@pytest.mark.parametrize(
    ("variables", "url", "proxy"),
    [
        ({}, "https://lark/", None),
        ({"HTTPS_PROXY": "proxy:3128"}, "https://lark/", "http://proxy:3128"),
        ({"https_proxy": " http://a:1 ", "HTTPS_PROXY": "http://b:1"}, "https://lark/", "http://a:1"),
        ({"HTTP_PROXY": "http://a:1"}, "https://lark/", None),
        ({"HTTP_PROXY": "", "ALL_PROXY": "socks5://a:1"}, "http://lark/", "socks5://a:1"),
        ({"ALL_PROXY": "a:1", "NO_PROXY": "*"}, "https://lark/", None),
        ({"ALL_PROXY": "a:1", "NO_PROXY": "example.com"}, "https://bot.example.com/", None),
        ({"ALL_PROXY": "a:1", "NO_PROXY": ".example.com, x"}, "https://bot.example.com/", None),
        ({"ALL_PROXY": "a:1", "NO_PROXY": "ample.com"}, "https://example.com/", "http://a:1"),
        ({"ALL_PROXY": "a:1", "NO_PROXY": "lark:443"}, "https://lark:8443/", "http://a:1"),
        ({"ALL_PROXY": "a:1", "NO_PROXY": "lark:8443"}, "https://lark:8443/", None),
        ({"ALL_PROXY": "a:1", "NO_PROXY": "lark:443"}, "https://lark/", None),
        ({"ALL_PROXY": "a:1", "NO_PROXY": "LARK.EXAMPLE.COM."}, "https://lark.example.com/", None),
        ({"ALL_PROXY": "a:1", "NO_PROXY": "lark.example.com"}, "https://lark.example.com./", None),
        ({"ALL_PROXY": "a:1", "NO_PROXY": "10.0.0.0/8"}, "https://10.1.2.3/", None),
        ({"ALL_PROXY": "a:1", "NO_PROXY": "10.0.0.0/8"}, "https://11.1.2.3/", "http://a:1"),
        ({"ALL_PROXY": "a:1", "NO_PROXY": "fd07::/64"}, "https://[fd07::5]/", None),
        ({"ALL_PROXY": "a:1", "NO_PROXY": "fd07::/64"}, "https://[fd08::5]/", "http://a:1"),
        ({"ALL_PROXY": "a:1", "NO_PROXY": "[::1]"}, "https://[::1]:8443/", None),
        ({"ALL_PROXY": "a:1", "NO_PROXY": "http://lark"}, "https://lark/", None),
    ],
)
def test_the_usual_variables_choose_the_proxy(
    no_proxies: pytest.MonkeyPatch, variables: dict[str, str], url: str, proxy: str | None
) -> None:
    for name, value in variables.items():
        no_proxies.setenv(name, value)
    assert proxy_for(url) == proxy


def test_a_proxy_is_used(group: LarkGroup, no_proxies: pytest.MonkeyPatch) -> None:
    """The card goes to the proxy, with the bot's whole address; here the group stands in for one."""
    no_proxies.setenv("HTTP_PROXY", f"127.0.0.1:{group.port}")
    with pytest.raises(Refused, match="copy the URL"):  # it is asked for http://bot.invalid/..., which is not its path
        LarkBot(f"http://bot.invalid/open-apis/bot/v2/hook/{TOKEN}", SECRET).send(card(message()))
    assert group.requests == 1


def test_a_socks_proxy_says_what_it_needs(group: LarkGroup, no_proxies: pytest.MonkeyPatch) -> None:
    no_proxies.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    no_proxies.setitem(sys.modules, "socksio", None)
    with pytest.raises(Refused, match=r"pip install 'httpx\[socks\]'"):
        LarkBot(group.url, SECRET).send(card(message()))


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        ("7", 7),
        ("1.5", 1.5),
        ("-5", 0),
        ("²", 0),
        ("nan", 0),
        ("inf", 600),
        ("1" * 400, 600),
        ("soon", 0),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 600),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Fri, 99 Jan 2100", 0),
    ],
)
def test_what_a_server_asks_to_wait(group: LarkGroup, asked: str, seconds: float) -> None:
    group.faults.append(Fault(429, retry_after=asked))
    with pytest.raises(Unavailable) as caught:
        LarkBot(group.url, SECRET).send(card(message()))
    assert caught.value.wait == seconds


def test_without_threads_the_writer_goes_on_and_the_messages_wait(
    group: LarkGroup, posted: Callable[..., Posted], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        ours = posted()
        for key in "ab":
            ours.mailbox.post(message(key))
        assert ours.notices == ["Lark notifications wait: can't start new thread."]
    ours.mailbox.post(message("c"))
    assert ours.mailbox.close(30) == 0
    assert ours.sent == ["a", "b", "c"]


def test_a_notice_that_raises_ends_nothing(group: LarkGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox_module, "RETRY_S", (0.01, 0.05))

    def raises(text: str) -> None:
        raise OSError(28, "No space left on device")

    group.faults += [Fault(503), Fault(404)]
    mailbox = Mailbox(LarkBot(group.url, SECRET), raises, raises)
    for key in "abc":
        mailbox.post(message(key))
    assert mailbox.close(30) == 0
    assert group.titles() == ["A title"] * 2, "one was refused"


@pytest.mark.parametrize(
    "url",
    [
        "open.feishu.cn/open-apis/bot/v2/hook/s3cr3t",
        "https://open.feishu.cn/s3cr3t",
        "https://open.feishu.cn/hook/",
        "https://open.feishu.cn:99x9/open-apis/bot/v2/hook/s3cr3t",
        "https://open.feishu.cn:999999/open-apis/bot/v2/hook/s3cr3t",
        "http://[::1/open-apis/bot/v2/hook/s3cr3t",
        "x",
    ],
)
def test_a_malformed_webhook_is_refused_with_a_right_one(url: str) -> None:
    with pytest.raises(
        SettingsError, match=r"^Invalid swanlab_lark_webhook_url: copy it from .*/bot/v2/hook/xxxx"
    ) as e:
        ObserverSettings(project="p", lark_webhook_url=url)
    assert "s3cr3t" not in str(e.value)


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_secret_is_none(blank: str) -> None:
    """So that nothing is said of signatures that are not made."""
    settings = ObserverSettings(project="p", lark_webhook_url=blank, lark_secret=blank, api_key=blank)
    assert settings.lark_webhook_url is settings.lark_secret is settings.api_key is None


def test_a_text_of_somebody_else_s_is_shown_without_secrets(group: LarkGroup) -> None:
    group.faults.append(
        Fault(body=json.dumps({"code": 10003, "msg": f"bad request to {group.url} by {SECRET}, {TOKEN}"}))
    )
    with pytest.raises(Refused, match=r"^code 10003, bad request to \*\*\* by \*\*\*, \*\*\*$"):
        LarkBot(group.url, SECRET).send({})


def test_a_bot_that_wants_a_secret_is_not_told_of_a_wrong_one(group: LarkGroup) -> None:
    with pytest.raises(Refused, match="the bot asks for signed messages: set swanlab_lark_secret"):
        LarkBot(group.url, None).send({})


@pytest.mark.parametrize("host", ["open.feishu.cn", "open.larksuite.com", "lark.example.com:8443"])
def test_feishu_lark_and_deployments(host: str) -> None:
    settings = ObserverSettings(project="p", lark_webhook_url=f"https://{host}/open-apis/bot/v2/hook/12ab-cd")
    assert settings.lark_webhook_url is not None
