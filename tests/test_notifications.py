"""What a run tells its group: from the writer's status to the cards that arrive."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swanlab_ray.actors.health.stragglers import Straggler
from swanlab_ray.actors.notify import messages as notifications_module
from swanlab_ray.actors.notify.cards import Message, card
from swanlab_ray.actors.notify.lark import LarkBot
from swanlab_ray.actors.notify.messages import GONE_GRACE_S, START_PATIENCE_S, STRAGGLER_S, Notifications
from swanlab_ray.actors.notify.rules import Fired
from swanlab_ray.actors.runs.summary import summarise
from swanlab_ray.actors.wire.status import RankStatus, WriterStatus
from swanlab_ray.actors.writer import ticker
from swanlab_ray.observer.transport import flusher as flusher_module
from tests.conftest import wait_until
from tests.incarnations import Cluster, Link, mortal, rank, settings_for
from tests.lark_bot import SECRET, TOKEN, LarkGroup, texts

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def status(states: tuple[str, ...] = ("running", "running"), **values: Any) -> WriterStatus:
    ranks = [
        RankStatus(
            rank=number, host=f"node{number // 2}", pid=100 + number, gpu=None, state=state, step=5, loss=0.5,
            step_time=0.1, silent=0.0, span="", idle=0.1, error=None, logged=1, received=1, spooled=0, dropped=0,
        )
        for number, state in enumerate(states)
    ]  # fmt: skip
    defaults: dict[str, Any] = {
        "run_id": "r", "project": "p", "experiment": "llama", "mode": "cloud", "state": "running", "error": None,
        "closed": False, "pid": 1, "world_size": 2, "ranks": ranks, "step": 5, "max_steps": 100, "epoch": None,
        "loss": 0.5, "learning_rate": 1e-4, "journal": "/logs/r", "received": 1, "written": 1, "thinned": 0,
        "withheld": 0, "completions": 0, "completions_dropped": 0, "hang": None, "straggler": None, "spans_dropped": 0,
        "late": 0, "rejected": 0, "spooled": 0, "dropped": 0, "killed": 0, "lag": 0.0, "run_dir": None, "url": "https://swanlab.cn/r",
        "notices": [],
    }  # fmt: skip
    return WriterStatus(**defaults | values)


class Kept:
    """A mailbox that keeps what is posted."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.notices: list[str] = []

    def post(self, message: Message) -> None:
        self.messages.append(message)

    def close(self, timeout: float) -> int:
        return 0

    def titles(self) -> list[str]:
        return [message.title.en.partition(" · ")[0] for message in self.messages]


@pytest.fixture
def kept() -> Kept:
    return Kept()


def notifications(kept: Kept, **more: Any) -> Notifications:
    return Notifications(kept, kept.notices.append, **{"began": 0.0} | more)  # type: ignore[arg-type]


def test_one_start_when_all_ranks_are_there_and_the_link_is_known(kept: Kept) -> None:
    told = notifications(kept)
    told.look(status(("running",)), 1.0)
    told.look(status(url=None), 2.0)
    assert kept.messages == []
    for now in (3.0, 4.0):
        told.look(status(), now)
    (message,) = kept.messages
    assert message.title == ("Training started · llama", "训练开始 · llama")
    assert message.link == "https://swanlab.cn/r"
    facts = {label.en: value for label, value in message.facts}
    assert facts == {
        "Project": "p", "Experiment": "llama", "Status": "running", "Ranks": "2/2", "Nodes": "1", "Step": "5/100",
        "Loss": "0.5", "Learning rate": "0.0001", "Duration": "3 s",
    }  # fmt: skip


def test_the_start_does_not_wait_without_end(kept: Kept) -> None:
    told = notifications(kept)
    told.look(status(("running",), url=None), 1.0)
    told.look(status(("running",), url=None, mode="offline"), 2.0 + START_PATIENCE_S)
    facts = {label.en: value for label, value in kept.messages[0].facts}
    assert facts["Where it lies"] == "/logs/r"
    assert facts["Upload it with"] == "swanlab-ray sync /logs/r"


@pytest.mark.parametrize(
    ("state", "title", "color"),
    [
        ("success", "Training complete", "green"),
        ("crashed", "Training failed", "red"),
        ("aborted", "Training aborted", "grey"),
    ],
)
def test_the_end_says_how(kept: Kept, state: str, title: str, color: str) -> None:
    told = notifications(kept)
    error = None if state == "success" else 'rank 1 (node0, pid 101): ValueError: boom\n  File "train.py", line 3'
    told.end(status((state, state), state=state, error=error, step=100), 7500.0, 1.0)
    assert kept.titles() == ["Training started", title]  # of a run so short that nobody had looked
    end = kept.messages[1]
    facts = {label.en: value for label, value in end.facts}
    assert end.color == color
    assert (facts["Step"], facts["Duration"], facts["Status"]) == ("100/100", "2 h 5 min", state)
    if error:
        assert end.text is not None
        assert end.text.zh == "rank 1 (node0, pid 101): ValueError: boom"
        assert end.code == '  File "train.py", line 3'


def test_a_long_error_is_cut(kept: Kept) -> None:
    """Such as that of a state dict that does not fit."""
    told = notifications(kept, posted=["start"])
    told.end(status(("crashed",), state="crashed", error="Error: " + "x" * 50_000 + "\n" + "y" * 50_000), 1.0, 1.0)
    with LarkGroup() as group:
        LarkBot(group.url, SECRET).send(card(kept.messages[0]))
        assert len(group.cards) == 1


def test_time_left(kept: Kept) -> None:
    told = notifications(kept, posted=["start"])
    told.look(status(step=10), 100.0)
    told.look(status(step=20, notices=["x"]), 200.0)
    facts = {label.en: value for label, value in kept.messages[0].facts}
    assert facts["Time left"] == "13 min"  # 80 steps of 10 s


def test_a_lost_rank_is_told_unless_the_run_ends_with_it(kept: Kept) -> None:
    told = notifications(kept, posted=["start"])
    lost = status(("running", "lost"))
    told.look(lost, 0.0)
    told.look(lost, GONE_GRACE_S - 1)
    assert kept.messages == []
    for now in (1, 2):
        told.look(lost, GONE_GRACE_S + now)
    assert kept.titles() == ["Ranks are gone"]
    told.look(status(), 100.0)  # it is heard again
    told.look(lost, 101.0)
    told.look(lost, 102.0 + GONE_GRACE_S)
    assert kept.titles() == ["Ranks are gone", "Ranks are back", "Ranks are gone"]
    assert kept.messages[0].text is not None
    assert kept.messages[0].text.en == "Rank 1 (node0, pid 101): lost. 1 other is running."


def test_a_rank_that_comes_back_and_finishes_at_once_is_told(kept: Kept) -> None:
    told = notifications(kept, posted=["start"])
    for now in (0.0, GONE_GRACE_S + 1):
        told.look(status(("running", "lost")), now)
    for now in (50.0, 60.0):
        told.look(status(("running", "success")), now)
    assert kept.titles() == ["Ranks are gone", "Ranks are back"]


def test_many_ranks_that_are_gone_are_one_message(kept: Kept) -> None:
    told = notifications(kept, posted=["start"])
    states = ("running",) * 20 + ("lost",) * 30 + ("crashed",) * 10
    for now in (0.0, GONE_GRACE_S + 1):
        told.look(status(states, world_size=60), now)
    (message,) = kept.messages
    assert message.text is not None
    assert message.text.en.endswith("; and 32 more. 20 others are running.")
    told.look(status(("lost",) * 60, world_size=60), 1000.0)  # it is over, or started again
    assert len(kept.messages) == 1


def test_a_sustained_straggler_and_what_ails_the_observer(kept: Kept) -> None:
    told = notifications(kept, posted=["start"])
    told.look(status(straggler=str(Straggler(1, "data", 0.3)), step=5), 0.0)
    told.look(status(straggler=str(Straggler(0, "data", 0.3)), step=6), STRAGGLER_S - 1)
    told.look(status(straggler=str(Straggler(1, "data", 0.4)), step=7), STRAGGLER_S + 1)
    assert kept.messages == []
    for step in range(8, 20):
        told.look(status(straggler=str(Straggler(1, "data", 0.5)), step=step), STRAGGLER_S + 1 + 5 * (step - 7))
    assert kept.messages == []  # a minute it is now, and no more
    told.look(status(straggler=str(Straggler(1, "data", 0.5)), step=20), 2 * STRAGGLER_S + 2)
    told.look(status(straggler=str(Straggler(1, "data", 0.6)), step=21), 2 * STRAGGLER_S + 3)
    told.look(
        status(notices=["The journal cannot be written.", "Lark refuses a notification: x."], dropped=9, killed=9),
        500.0,
    )
    told.look(status(dropped=10, killed=9), 501.0)
    assert kept.titles() == [
        "One rank slows down the others",
        "The observer needs attention",
        "The observer has lost data",
    ]
    assert kept.messages[0].text is not None
    assert "rank 1, data" in kept.messages[0].text.en
    assert kept.messages[1].text is not None
    assert kept.messages[1].text.en == "The journal cannot be written."


def test_whom_they_waited_for_last_before_an_evaluation_does_not_slow_them_down(kept: Kept) -> None:
    """While no step is made, what was found in the last ones still stands there."""
    told, slow = notifications(kept, posted=["start"]), str(Straggler(1, "data", 0.2))
    for second in range(0, 600, 5):
        told.look(status(straggler=slow), second)
    told.look(status(straggler=slow, step=6), 600)
    told.look(status(straggler=slow, step=7), 1200)
    assert kept.messages == []
    told.look(status(straggler=slow, step=8), 1800)  # three steps of ten minutes, and for each they waited
    assert kept.titles() == ["One rank slows down the others"]


def test_an_alert_is_a_card_and_a_notice(kept: Kept) -> None:
    told = notifications(kept, posted=["start", "Alert: x > 1 (2 at step 3)"], noticed=["Alert: x > 1 (2 at step 3)"])
    told.fire(Fired("x > 1", 3, 2.0), status(), 1.0)  # as when history is read again
    told.fire(Fired("x > 1", 40, 5.0), status(), 1.0)
    told.look(status(notices=kept.notices), 2.0)
    assert kept.notices == ["Alert: x > 1 (5 at step 40)"]
    (message,) = kept.messages
    assert message.title == ("Alert: x > 1 · llama", "指标提醒：x > 1 · llama")
    assert message.text == ("It is 5 at step 40.", "第 40 步的值为 5。")


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[LarkGroup]:
    mortal(monkeypatch)
    monkeypatch.setattr(flusher_module, "RETRY_S", (0.01, 0.05))
    monkeypatch.setattr(notifications_module, "START_PATIENCE_S", 0.0)  # no SwanLab here says where the run is
    monkeypatch.setattr(ticker, "STATUS_LINE_S", 0.1)
    with LarkGroup() as group:
        yield group


def test_a_job_of_four_ranks_sends_one_start_and_one_end(
    tmp_path: Path, group: LarkGroup, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where its writer is killed in between; and no secret stays behind."""
    cluster = Cluster(settings_for(tmp_path, lark_webhook_url=group.url, lark_secret=SECRET))
    with caplog.at_level("INFO", "swanlab_ray"):
        ranks = [rank(cluster, Link(cluster), number, 4) for number in range(4)]
        for kill in range(3):
            for observer in ranks:
                observer.log({"loss": 1.0, "lr": 0.1}, kill)
                assert observer.flush()
            wait_until(lambda: summarise(cluster.files.paths).notified == {"start"})
            if kill < 2:
                cluster.kill()
        for observer in ranks:
            assert observer.finish()
    wait_until(lambda: len(group.cards) >= 2)
    assert group.titles() == ["Training started", "Training complete"]
    assert "**Loss**\n1" in texts(group.cards[1])
    said = [record.message for record in caplog.records]
    assert said.count("Registered Lark notification callback with HMAC authentication") == 1
    left = caplog.text + json.dumps(group.cards)
    left += "".join(path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN not in left
    assert SECRET not in left


def test_without_a_secret_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, group: LarkGroup) -> None:
    group.secret = None
    cluster = Cluster(settings_for(tmp_path, lark_webhook_url=group.url))
    with caplog.at_level("INFO", "swanlab_ray"):
        observer = rank(cluster, Link(cluster))
        observer.set_result("crashed", "ValueError: boom\n  the last line")
        assert observer.finish("crashed", "ValueError: boom\n  the last line")
    said = [record.message for record in caplog.records]
    assert "Registered Lark notification callback (no HMAC secret)" in said
    (warning,) = [sentence for sentence in said if sentence.startswith("Lark webhook")]
    assert warning.startswith("Lark webhook has no secret configured. For production use, set 'swanlab_lark_secret'")
    wait_until(lambda: len(group.cards) >= 2)
    assert group.titles() == ["Training started", "Training failed"]
    assert "ValueError: boom\n" in texts(group.cards[1])
    assert "the last line" in texts(group.cards[1])


def test_a_job_that_goes_on_says_so(tmp_path: Path, group: LarkGroup) -> None:
    for arrived in (2, 4):
        cluster = Cluster(settings_for(tmp_path, lark_webhook_url=group.url, lark_secret=SECRET))
        observer = rank(cluster, Link(cluster))
        observer.log({"loss": 1.0}, 1)
        assert observer.finish()
        wait_until(lambda arrived=arrived: len(group.cards) >= arrived)  # type: ignore[misc]
    assert group.titles() == ["Training started", "Training complete", "Training goes on", "Training complete"]
