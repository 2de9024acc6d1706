"""Rules on metrics: what can be written, and when they come true."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from swanlab_ray.actors.notify.rules import FIRES, REARM_VALUES, Rules, parse
from swanlab_ray.actors.settings import ObserverSettings, SettingsError
from swanlab_ray.observer.history import archive
from tests.incarnations import Cluster, Link, mortal, rank, settings_for

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def steps(rule: str, values: list[float], name: str = "x") -> list[int]:
    """At which of these values it comes true."""
    rules = Rules([rule])
    return [step for step, value in enumerate(values) if rules.look(step, step, {name: value})]


@pytest.mark.parametrize(
    ("rule", "fires"),
    [
        ("x < 2", [0]),
        ("x <= 1", [0]),
        ("x>2", [2]),
        ("x >= 3.0", [2]),
        ("x == 2", [1]),
        ("x != 1e0", [1]),
        ("x > 9", []),
    ],
)
def test_comparisons(rule: str, fires: list[int]) -> None:
    assert steps(rule, [1.0, 2.0, 3.0]) == fires


def test_a_comparison_fires_once_until_it_was_false_for_a_while() -> None:
    noisy = [0.9, 1.1] * 10 + [1.1] * REARM_VALUES + [0.9]
    assert steps("x < 1", noisy) == [0, len(noisy) - 1]
    assert steps("x < 1", [math.nan, math.inf]) == []
    assert len(steps("x < 1", ([0.9] + [1.1] * REARM_VALUES) * 20)) == FIRES


def test_nan_on_any_rank() -> None:
    assert steps("x is nan", [1.0, math.nan, math.nan, 1.0, math.inf]) == [1]
    assert steps("x is nan", [math.inf, *[1.0] * REARM_VALUES, math.nan]) == [0, REARM_VALUES + 1]
    assert Rules(["x is nan"]).look(3, 0, {"x": 1.0, "ranks/x/nonfinite": 1.0})


def test_no_improvement() -> None:
    falling = [5.0, 4.0, 4.0, 4.5, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0]
    assert steps("no improvement of eval/loss for 3 steps", falling, "eval/loss") == [4, 9]
    assert steps("no improvement of accuracy for 3 steps", falling, "accuracy") == [3]
    assert steps("no decrease of x for 3 step", falling) == [4, 9]
    assert steps("no increase of power for 3 steps", falling, "power") == [3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("loss", "is no rule: write 'METRIC < NUMBER'"),
        ("loss <", "is no rule"),
        ("loss < one", "'one' is no number"),
        ("loss == nan", "write 'loss is nan'"),
        ("loss < 1 and x > 2", "is no rule"),
        ("__import__('os') < 1 or 2", "is no rule"),
        ("no improvement of x for 10 steps", "is more of x better"),
        ("no improvement of loss for ten steps", "is no rule"),
    ],
)
def test_what_is_no_rule_is_refused_at_the_start(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(text)
    with pytest.raises(SettingsError, match=rf"^Invalid alerts: .*{said}"):
        ObserverSettings(project="p", alerts=[text])


def test_rules_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBSERVER_ALERTS", "loss  < 1.0 ; ranks/grad_norm/max > 100;")
    assert ObserverSettings(project="p").alerts == ("loss < 1.0", "ranks/grad_norm/max > 100")
    with pytest.raises(SettingsError, match=r"^Invalid alerts 3: write rules as texts"):
        ObserverSettings(project="p", alerts=3)


def test_an_alert_is_told_once_also_by_a_writer_that_was_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mortal(monkeypatch)
    for job in range(2):  # the second goes on with the run
        cluster = Cluster(settings_for(tmp_path, alerts=["loss < 0.5"]))
        ranks = [rank(cluster, Link(cluster), number, 2) for number in range(2)]
        for step in range(3 * job, 3 * job + 3):
            for observer in ranks:
                observer.log({"loss": 1.0 / (step + 1) + observer.rank, "y": math.nan}, step)
                assert observer.flush()
        cluster.kill()
        for observer in ranks:
            observer.log({"loss": 0.1 + observer.rank / 10}, 3 * job + 3)
        for observer in ranks:
            assert observer.finish()
    (run,) = archive.load(tmp_path)
    told = [alert.text for alert in run.summary.alerts if alert.text.startswith("Alert")]
    assert told == ["Alert: loss < 0.5 (0.15 at step 3)"]


@pytest.mark.parametrize("world", [1, 2, 20])
@pytest.mark.parametrize("scope", ["measured", "logged"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_of_one_rank_is_told_once_with_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, scope: str, bad: float
) -> None:
    """By the default rules, also where the Trainer leaves it out of the loss that it logs, and it goes on for long."""
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path))
    ranks = [rank(cluster, Link(cluster), number, world) for number in range(world)]
    worst = world - 1
    for step in range(10):
        for observer in ranks:
            log = observer.log_rank if scope == "measured" else observer.log
            log({"loss": bad if step >= 3 and observer.rank >= worst else 1.0}, step)
        ranks[0].log_job({"train/loss": 1.0}, step)
    for observer in ranks:
        assert observer.finish()
    (run,) = archive.load(tmp_path)
    told = [alert.text for alert in run.summary.alerts]
    assert told == [f"Alert: loss is nan ({bad} at step 3 on rank {worst})"]


def test_a_rule_on_nan_is_armed_again_by_good_values_of_a_measurement() -> None:
    rules = Rules(["loss is nan"])

    def good(step: int) -> None:
        assert not rules.look(step, 0, {"ranks/loss/mean": 1.0, "rank/0/loss": 1.0})

    assert [fired.rank for fired in rules.nonfinite(3, "loss", 0, 0, math.nan)] == [3]
    for step in range(1, REARM_VALUES):
        good(step)
    assert not rules.nonfinite(3, "loss", REARM_VALUES, 0, math.nan)
    for step in range(REARM_VALUES + 1, 2 * REARM_VALUES + 1):
        good(step)
    assert rules.nonfinite(0, "loss", 99, 0, math.nan)
    assert not rules.nonfinite(0, "other", 99, 0, math.nan)
