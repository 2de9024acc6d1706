"""When a job counts as hung, who is named, and what the ranks tell about it."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from swanlab_ray.actors.health.hangs import FIRST_STEPS, LONG, PAUSES, STACKS_S, Health, Over
from swanlab_ray.actors.membership.members import Member, RankView
from swanlab_ray.actors.runs.summary import summarise
from swanlab_ray.actors.wire.codec import decode_batch
from swanlab_ray.actors.wire.events import Outcome, Stacks
from swanlab_ray.actors.wire.messages import BEAT_S, Doing, Hello
from swanlab_ray.actors.wire.status import Hang
from swanlab_ray.observer.cli import main
from swanlab_ray.observer.job.doing import Pulse
from swanlab_ray.observer.timing.spans import Span, SpanLog
from tests.conftest import wait_until
from tests.incarnations import Cluster, Link, mortal, rank, settings_for
from tests.lark_bot import LarkGroup, texts

TIMEOUT = 100.0
ALL_REDUCE = ["/v/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py:2940 in all_reduce"]
TRAIN = "/job/train.py:10 in train"
LOADER = "/job/train.py:88 in load"


class Job:
    """Ranks that say what they do, every two seconds of a clock of their own."""

    def __init__(self, ranks: int = 4, timeout: float = TIMEOUT) -> None:
        self.states: dict[int, str] = {}
        self.health = Health(timeout, lambda member: self.states.get(member.process.rank))
        self.now = 1000.0
        self.unix = 1e9  # what the clock says beyond that
        self.moved = dict.fromkeys(range(ranks), self.now)
        self.steps: dict[int, int | None] = dict.fromkeys(range(ranks))
        self.spans = dict.fromkeys(range(ranks), "")
        self.mute: set[int] = set()
        self.members = [
            Member(
                Hello(rank=n, world_size=ranks, local_rank=n, host="node", pid=100 + n, pid_namespace="", gpu=None,
                      life=f"life{n}", next_seq=0),
                self.now,
                RankView(),
            )
            for n in range(ranks)
        ]  # fmt: skip
        self.over: list[Over] = []

    def step(self, *ranks: int, seconds: float = 2.0) -> None:
        """Time passes, then some ranks make a step; all without arguments."""
        self.wait(seconds)
        for number in ranks or self.moved:
            self.steps[number] = (self.steps[number] or 0) + 1
            self.moved[number] = self.now
        self.beat()

    def beat(self) -> None:
        for n, moved in self.moved.items():
            if n not in self.mute:
                self.health.beat(n, f"life{n}", Doing(self.steps[n], self.spans[n], self.now - moved), self.now)
        over = self.health.look(self.members, self.now, self.now + self.unix)
        if over is not None:
            self.over.append(over)

    def wait(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + BEAT_S)
            self.beat()

    def train(self, steps: int = 10, seconds: float = 2.0) -> None:
        for _ in range(steps):
            self.step(seconds=seconds)

    def stands(self, number: int, *frames: str, busy: bool = False) -> None:
        stacks = Stacks(0, self.steps[number], self.spans[number], busy, ["training"], [list(frames)])
        self.health.take(number, f"life{number}", stacks)

    def told(self) -> Hang:
        hang = self.hang()
        assert hang is not None
        return hang

    def hang(self) -> Hang | None:
        self.beat()
        return self.health.hang


def test_a_rank_that_stands_still_is_named_by_what_the_others_wait_in() -> None:
    job = Job()
    job.train()
    job.spans = {0: "backward", 1: "data", 2: "backward", 3: "backward"}
    job.wait(TIMEOUT - 5)
    assert job.health.asks == 0
    job.wait(10)
    assert job.health.asks
    assert job.hang() is None  # not before they have said where they stand
    for number in (0, 2, 3):
        job.stands(number, *ALL_REDUCE, TRAIN)
    job.stands(1, LOADER, TRAIN, busy=True)
    hang = job.told()
    assert hang.text == (
        "Rank 1 (node, pid 101) is behind: step 10, in data, at job/train.py:88 in load. "
        "Ranks 0, 2, 3 wait: step 10, in backward, at job/train.py:10 in train "
        "(distributed/distributed_c10d.py:2940 in all_reduce)."
    )
    assert hang.seconds == pytest.approx(TIMEOUT + 5, abs=BEAT_S)
    assert hang.stacks.startswith("rank 1, innermost first:\n  job/train.py:88 in load\n  job/train.py:10 in train\n\n")
    assert "rank 0, innermost first:\n  distributed/distributed_c10d.py:2940 in all_reduce" in hang.stacks
    job.wait(500)
    assert job.hang() is hang  # it is told once
    job.step()
    assert job.hang() is None
    (over,) = job.over
    assert over.seconds == pytest.approx(TIMEOUT + 5 + 500 + 2, abs=BEAT_S)


def test_a_rank_at_an_earlier_step_is_behind() -> None:
    job = Job()
    job.train()
    job.step(0, 1, 3)
    job.wait(TIMEOUT + 5)
    for number in range(4):
        job.stands(number, *ALL_REDUCE, TRAIN)
    assert job.told().text.startswith("Rank 2 (node, pid 102) is behind: step 10, at ")


def test_a_rank_that_stands_elsewhere_is_behind() -> None:
    """The GPU is waited for in a call without a frame of its own."""
    job = Job()
    job.train()
    job.wait(TIMEOUT + 5)
    for number in range(4):
        job.stands(number, "/job/train.py:20 in loss" if number != 3 else "/job/train.py:30 in log", TRAIN)
    assert job.told().text.startswith("Rank 3 (node, pid 103) is behind: step 10, at job/train.py:30 in log.")


def test_all_wait_for_each_other() -> None:
    job = Job(2)
    job.train()
    job.wait(TIMEOUT + 5)
    for number in range(2):
        job.stands(number, *ALL_REDUCE, TRAIN)
    assert job.told().text.startswith("All ranks wait: step 10, at job/train.py:10 in train")


def test_a_rank_that_has_ended_is_why_the_others_wait() -> None:
    job = Job(2)
    job.train()
    job.members[1].state = "success"
    job.wait(TIMEOUT + 5)
    job.stands(0, *ALL_REDUCE, TRAIN)
    assert job.told().text.startswith("Rank 1 has ended (success). Rank 0 waits: step 10")


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ("T", "its process is stopped (SIGSTOP, or a debugger)"),
        ("S", "its process lives, but perhaps lets no other thread run"),
        (None, "its process or its machine may be gone"),
    ],
)
def test_a_silent_rank_is_named(state: str | None, why: str) -> None:
    job = Job(2)
    job.train()
    job.mute.add(1)
    job.states = {1: state} if state else {}
    job.wait(TIMEOUT + 5)
    job.stands(0, *ALL_REDUCE, TRAIN)
    assert job.told().text.startswith(f"Rank 1 (node, pid 101) gives no sign of life: {why}. Rank 0 waits: ")


def test_stacks_that_never_come_are_not_waited_for() -> None:
    job = Job(2)
    job.train()
    job.wait(TIMEOUT + 2 + STACKS_S)
    job.wait(4)
    assert job.told().text.startswith("All ranks wait: step 10.")


def test_what_takes_long_anyway_is_no_hang() -> None:
    """The first step, an evaluation, a checkpoint, and a step as slow as those before."""
    job = Job(2)
    job.wait(TIMEOUT * LONG - 10)  # the model is compiled
    assert job.health.asks == 0
    job.train(FIRST_STEPS + 1)
    for span in ("evaluate", "checkpoint"):
        job.spans[0] = span
        job.beat()
        job.wait(TIMEOUT * LONG - 10)
        job.spans[0] = ""
        job.step()
    job.wait(TIMEOUT - 10)
    job.step()
    job.wait((TIMEOUT - 10) * PAUSES - 10)
    assert job.health.asks == 0
    assert job.over == []


def test_slow_steps_from_the_start_are_no_hang() -> None:
    job = Job(2)
    for _ in range(8):
        job.wait(3 * TIMEOUT)
        assert job.health.asks == 0
        job.step()
    job.wait(5 * TIMEOUT)
    assert job.health.asks == 0


def test_a_span_of_the_user_s_around_an_evaluation_changes_nothing() -> None:
    job = Job(1)
    job.train()
    job.spans[0] = "epoch > evaluate"
    job.wait(LONG * TIMEOUT - 10)
    assert job.health.asks == 0


def test_an_outage_is_no_pause_of_the_training() -> None:
    """The writer hears nothing for an hour; afterwards the limit is what it was."""
    job = Job(2)
    job.train()
    job.now += 3600
    job.moved = dict.fromkeys(job.moved, job.now)
    job.beat()
    job.wait(TIMEOUT + 10)
    assert job.health.asks


def test_a_job_that_is_started_again_does_not_move() -> None:
    job = Job(2)
    job.train()
    job.wait(TIMEOUT + 6 + STACKS_S)
    job.told()
    for member in job.members:
        member.state = "crashed"
    job.beat()
    assert job.hang() is None
    assert job.over == []
    for number in range(2):
        job.health.beat(number, "another life", Doing(1, "", 0.0), job.now)
    job.beat()
    assert job.over == []


def test_a_second_training_of_a_process_begins_anew() -> None:
    job = Job(2)
    job.train()
    for member in job.members:
        member.view.outcome = Outcome("success", None, 0)
    job.wait(10 * TIMEOUT)
    for member in job.members:
        member.view.outcome = Outcome(None, None, 0)
    job.wait(LONG * TIMEOUT - 10)  # it is compiled
    assert job.health.asks == 0


def test_who_waits_within_a_collective_is_seen_above_the_user_s_code_only() -> None:
    """torchrun's own frames are below it; and a minority that seems to meet is none."""
    agent = "/v/lib/python3.11/site-packages/torch/distributed/elastic/multiprocessing/api.py:700 in _wrap"
    job = Job(3)
    job.train()
    job.wait(TIMEOUT + 5)
    job.stands(0, *ALL_REDUCE, TRAIN, agent)
    job.stands(1, LOADER, TRAIN, agent)
    job.stands(2, *ALL_REDUCE, TRAIN, agent)
    assert job.told().text.startswith("Rank 1 (node, pid 101) is behind")
    job = Job(3)
    job.train()
    job.wait(TIMEOUT + 5)
    sync = "/job/train.py:20 in loss"
    job.stands(0, sync, TRAIN)
    job.stands(1, *ALL_REDUCE, TRAIN)
    job.stands(2, sync, TRAIN)
    assert job.told().text.startswith("Rank 1 (node, pid 101) is behind")


def test_the_only_rank_that_has_not_ended_is_the_one_that_hangs() -> None:
    job = Job(2)
    job.train()
    job.members[0].state = "success"
    job.wait(TIMEOUT + 5)
    job.stands(1, TRAIN)
    assert job.told().text.startswith("Rank 1 (node, pid 101) is behind: step 10, at job/train.py:10 in train.")


def test_ranks_that_get_ahead_within_an_evaluation_are_alive() -> None:
    job = Job(1)
    job.train()
    for _ in range(50):
        job.wait(TIMEOUT / 2)
        job.moved[0] = job.now  # a span has ended
    assert job.health.asks == 0


def test_who_tells_no_step_is_not_judged() -> None:
    """Rank 1 only logs at its start."""
    job = Job(2)
    job.step()
    for _ in range(50):
        job.step(0, seconds=TIMEOUT)
    assert job.health.asks == 0


def test_a_training_that_is_over_hangs_not() -> None:
    job = Job(2)
    job.train()
    for member in job.members:
        member.view.outcome = Outcome("success", None, 0)  # and a long evaluation follows
    job.wait(TIMEOUT * 10)
    assert job.health.asks == 0


def test_a_lost_rank_was_told_already() -> None:
    job = Job(2)
    job.train()
    job.members[1].state = "lost"
    job.mute.add(1)
    job.wait(TIMEOUT * 10)
    assert job.health.asks == 0


def test_nothing_is_told_of_a_writer_that_was_away() -> None:
    job = Job(2)
    job.train()
    job.now += 10 * TIMEOUT  # this process was stopped, and the ranks went on
    job.moved = dict.fromkeys(job.moved, job.now)
    job.health.paused(10 * TIMEOUT, job.now)
    job.beat()
    assert job.health.asks == 0


def test_a_notebook_whose_user_thinks_is_no_hang() -> None:
    """Steps came quickly, then nothing for hours; the next cell is judged from its own beginning."""
    job = Job(1)
    job.train(seconds=0.1)
    job.wait(20 * TIMEOUT)
    assert job.health.asks == 0
    job.spans[0] = "epoch"  # from now on it says that it is at work
    job.wait(TIMEOUT - 10)
    assert job.health.asks == 0
    job.wait(20)
    assert job.health.asks


@pytest.mark.parametrize("trains", [True, False])
def test_one_process_is_judged_while_a_trainer_trains_in_it(trains: bool) -> None:
    job = Job(1)
    job.members[0].view.outcome = Outcome(None if trains else "success", None, 0)
    job.train()
    job.wait(TIMEOUT + 10)
    assert bool(job.health.asks) == trains


def test_stacks_are_asked_for_again_though_the_clock_was_set_back() -> None:
    job = Job(2)
    asked = []
    for number, hours in enumerate((0, 1, 1)):
        job.train()
        job.unix = 1e9 - 3600.0 * hours
        job.wait(TIMEOUT * 3**number + 6 + STACKS_S)  # longer each time: a pause that has ended counts as ordinary
        asked.append(job.health.asks)
        job.step()
    assert 0 < asked[0] < asked[1] < asked[2]


def test_zero_is_never() -> None:
    job = Job(2, timeout=0)
    job.train()
    job.wait(100_000)
    assert job.health.asks == 0


def test_the_pulse_of_a_rank() -> None:
    """Its step, the spans that are open, and where it stands, from another thread."""
    log = SpanLog(lambda event: None, lambda: 7)
    pulse = Pulse(log, lambda: log.step)
    log.step = 7
    pulse.look()

    with Span(log, "evaluate"), Span(log, "forward"):
        found = []
        other = threading.Thread(target=lambda: found.append((pulse.doing(), pulse.stacks())), name="swanlab-ray-x")
        other.start()
        other.join()
    doing, event = found[0]
    assert (doing.step, doing.span) == (7, "evaluate > forward")
    assert 0 <= doing.idle < 60
    ((stacks,), _) = decode_batch(b"\x91" + event)
    assert isinstance(stacks, Stacks)
    assert (stacks.step, stacks.span, stacks.threads[0]) == (7, "evaluate > forward", "training")
    assert any(frame.endswith(" in test_the_pulse_of_a_rank") and __file__ in frame for frame in stacks.frames[0])
    assert not any("swanlab-ray" in name for name in stacks.threads)
    assert log.open_names() == ""
    before = pulse.doing().idle
    log._encode()  # the spans are sent
    assert pulse.doing().idle <= before


def test_spans_that_end_in_another_order_leave_nothing_open() -> None:
    log = SpanLog(lambda event: None)
    outer, inner = Span(log, "outer"), Span(log, "inner")
    outer.__exit__(None, None, None)
    assert log.open_names() == "inner"
    inner.__exit__(None, None, None)
    assert log.open_names() == ""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.takes(10)
def test_a_hang_is_told_once_and_that_it_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of this process, one of which stands still: cards, the journal's alerts, and the stacks in it."""
    mortal(monkeypatch)
    monkeypatch.setattr("swanlab_ray.actors.writer.ticker.STATUS_LINE_S", 0.2)
    monkeypatch.setattr("swanlab_ray.observer.transport.window.BEAT_S", 0.1)
    monkeypatch.setattr("swanlab_ray.actors.health.hangs.FIRST_STEPS", 1)
    with LarkGroup() as group:
        bot = {"lark_webhook_url": group.url, "lark_secret": group.secret}
        cluster = Cluster(settings_for(tmp_path, hang_timeout=8.0, **bot))
        ranks = [rank(cluster, Link(cluster), number, 2) for number in range(2)]
        step = 0

        def train() -> None:
            nonlocal step
            for observer in ranks:
                observer.log({"x": step}, step)
            step += 1
            time.sleep(0.05)

        while step < 40:
            train()
        wait_until(lambda: "Training hangs" in group.titles())
        hang = cluster.find().status().hang
        assert hang is not None
        assert f"step {step - 1}" in hang.text
        while "Training moves again" not in group.titles():
            train()
        for observer in ranks:
            observer.finish()
        wait_until(lambda: "Training complete" in group.titles())
    assert group.titles() == ["Training started", "Training hangs", "Training moves again", "Training complete"]
    assert "test_health.py" in texts(group.cards[1])
    alerts = [alert.text for alert in summarise([cluster.files.paths[0]]).alerts]
    assert [text.partition(" for ")[0] for text in alerts if " step" in text][:1] == ["No rank has made a step"]
    shown = CliRunner().invoke(main, ["show", "--stacks", "--log-dir", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert sorted(re.findall(r"rank (\d), step \d+, 20", shown.stdout)) == ["0", "1"]
    assert re.search(r"training:\n  \S+:\d+ in .*\n(  .*\n)*  \S+test_health\.py:\d+ in test_a_hang_is", shown.stdout)
