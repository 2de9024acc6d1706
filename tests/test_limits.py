"""What SwanLab takes and what it does not, in each mode: every good value arrives, the counts are those of what is
there, and what is left out is told under its name.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import swanlab
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from swanlab.sdk.internal.pkg import constraints
from swanlab.sdk.internal.run.fmt import validate_key

from swanlab_ray.actors.delivery import cloud as cloud_run
from swanlab_ray.actors.delivery import disk as swanlab_run
from swanlab_ray.actors.delivery.cloud import CloudRun
from swanlab_ray.actors.delivery.disk import SwanLabRun, remove_run
from swanlab_ray.actors.delivery.sink import FINISH_DEADLINE_S, SCALAR_BYTES, Row, Sink
from swanlab_ray.actors.delivery.thinning import SERIES, SERIES_PER_SECOND, Beginnings, Thinning
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.swanlab import sdk
from swanlab_ray.actors.swanlab.limits import HIGHEST_STEP, Limits, fit_config, fitting
from swanlab_ray.actors.wire.events import State
from swanlab_ray.actors.writer import ending, telling
from swanlab_ray.observer.observer import FINISH_TIMEOUT_S
from tests.conftest import wait_until
from tests.incarnations import NoSwanLab
from tests.swanlab_cloud import SwanLabCloud
from tests.swanlab_file import only_run

MODES = ["cloud", "local", "offline"]
NASTY = [
    "/lead", "trail/", " sp ", "a\tb", "", "n" * 600, "n" * 601, "trail.", "中文/损失", "a b", "a%b",
    "x'y\"z", "<script>", "a\nb", "\x00nul", "..", "a//b", "[red]r[/red]", "a\\b", "\u202eabc", "ÄÖ", "\x7f",
    "a\u00a0", "\u3000", "\ud800",
    "__swanlab__.x", "rlhf_completions", "n" * 512, "n" * 513, "sp", "lead",
]  # fmt: skip


class Delivered:
    """A sink of a mode, and what has arrived."""

    def __init__(self, mode: str, log_dir: Path, cloud: SwanLabCloud) -> None:
        self.notices: list[str] = []
        self.cloud = cloud
        self.settings = ObserverSettings(project="p", mode=mode, log_dir=log_dir)
        self.sink: Sink
        if mode == "cloud":
            self.sink = CloudRun(self.settings, "r", 0, "journal", lambda rows: None, self._tell, lambda sink: None)
        else:
            self.sink = SwanLabRun(self.settings, "r", [], self._tell, lambda sink: None)
        self.sink.waits = True
        self.sink.start()

    def _tell(self, sentence: str) -> None:
        self.notices.append(sentence)

    def write(self, step: int, values: dict[str, float], time_ns: int = 1_700_000_000 * 10**9) -> None:
        self.sink.write(step, time_ns, values)

    def finish(self, state: State = "success") -> dict[str, dict[int, float]]:
        self.sink.finish(state, None)
        assert self.sink.closed.wait(60)
        if self.sink.mode == "cloud":
            assert self.cloud.only().state == "FINISHED"
            return self.cloud.only().points
        run = only_run(self.settings.log_dir)
        assert run.state == "finished"
        return run.scalars

    @property
    def config(self) -> dict[str, Any]:
        if self.sink.mode == "cloud":
            return {name: entry["value"] for name, entry in self.cloud.only().profile["config"].items()}
        return only_run(self.settings.log_dir).config


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[SwanLabCloud]:
    monkeypatch.setattr(cloud_run, "RETRY_S", (0.02, 0.2))
    with SwanLabCloud() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


@settings(deadline=None)
@given(st.text(max_size=600) | st.sampled_from(NASTY))
def test_a_fitted_name_is_one_that_swanlab_leaves_as_it_is(name: str) -> None:
    fitted = fitting(name)
    if fitted is not None:
        assert validate_key(fitted) == constraints.ta_metric_key.validate_python(fitted) == fitted
        assert fitting(fitted) == fitted
    try:
        good = validate_key(name) == name == name.strip() and len(name) <= 512
    except Exception:
        good = False
    if good and name.isprintable() and name != "rlhf_completions" and not name.startswith("__swanlab__."):
        assert fitted == name


names = st.lists(st.text(max_size=20) | st.sampled_from(NASTY), min_size=5, max_size=25, unique=True)


@pytest.mark.parametrize(
    ("name", "written", "stands_as"),
    [
        ("é\n\x1b[31m", r"é\n\x1b[31m", "é␊␛[31m"),
        ("loss\xa0", r"loss\xa0", "loss"),
        ("\\alpha/", r"\alpha/", r"\alpha"),
        ("n" * 600, f"{'n' * 40}...{'n' * 20}", None),
    ],
)
def test_a_name_and_what_stands_for_it_are_told_apart(name: str, written: str, stands_as: str | None) -> None:
    told: list[str] = []
    assert len(Limits(told.append).fit(0, {name: 1.0})) == 1
    (sentence,) = told
    before, after = sentence.split(" is no name for SwanLab: it stands there as ")
    assert before == f"'{written}'"
    assert after != f"'{written}'."
    assert stands_as is None or after == f"'{stands_as}'."
    assert sentence.isprintable()


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(odd=names)
def test_odd_names_cost_no_other(
    odd: list[str], mode: str, tmp_path_factory: pytest.TempPathFactory, cloud: SwanLabCloud
) -> None:
    """What arrives under a name is what was logged under it, or under one name that it stands for."""
    cloud.experiments.clear()
    run = Delivered(mode, tmp_path_factory.mktemp(mode), cloud)
    values = {name: float(number) for number, name in enumerate(odd)} | {"good": -1.0}
    for step in range(3):
        run.write(step, {name: value + step / 8 for name, value in values.items()})
    points = run.finish()
    assert points["good"] == {step: -1.0 + step / 8 for step in range(3)}
    of_value = {value: name for name, value in values.items()}
    for sent, series in points.items():
        name = of_value[series[0]]
        assert series == {step: values[name] + step / 8 for step in range(3)}
        assert fitting(name) == sent
    for name in odd:
        if fitting(name) == name:
            assert name in points
        else:
            assert len(run.notices) > 20 or any("is no name for SwanLab" in notice for notice in run.notices)
    assert run.sink.written == sum(map(len, points.values()))
    assert run.sink.written + run.sink.withheld == 3 * len(values)
    assert len(run.notices) <= 22


@pytest.mark.parametrize("mode", MODES)
def test_odd_steps_times_and_values_cost_no_other(mode: str, tmp_path: Path, cloud: SwanLabCloud) -> None:
    run = Delivered(mode, tmp_path, cloud)
    for step in [0, 2**63 + 5, 1, HIGHEST_STEP, HIGHEST_STEP + 1, 2**64 - 1]:
        run.write(step, {"x": 1.0, "y": 2.0})
    for step, time_ns in enumerate([-1, 0, 2**63, 2**64 - 1], 2):
        run.write(step, {"x": 1.0}, time_ns)
    run.write(6, {"x": 1e308, "y": -0.0})
    points = run.finish()
    assert set(points["x"]) == {0, 1, 2, 3, 4, 5, 6, HIGHEST_STEP}
    assert set(points["y"]) == {0, 1, 6, HIGHEST_STEP}
    assert (run.sink.written, run.sink.withheld) == (12, 6)
    assert [("'x'" in notice or "'y'" in notice) and "2^48" in notice for notice in run.notices] == [True, True]
    assert run.sink.complete


@pytest.mark.parametrize("mode", MODES)
def test_an_odd_configuration_costs_no_part_and_no_value(mode: str, tmp_path: Path, cloud: SwanLabCloud) -> None:
    class Odd:
        def __str__(self) -> str:
            raise ValueError("cannot be described")

    run = Delivered(mode, tmp_path, cloud)
    deep: Any = "end"
    for _ in range(500):
        deep = [deep]
    run.sink.config({"a": 10**30, "b": "\ud800", "c": math.inf, "d": deep, "e": {1: b"x"}, "f": Odd(), "g": 10**5000})
    run.sink.config({"lr": 0.1, "text": "x" * 100_000})
    run.write(0, {"x": 1.0})
    assert run.finish() == {"x": {0: 1.0}}
    config = run.config
    assert (config["a"], config["b"], config["c"], config["lr"]) == (1e30, "?", "Inf", 0.1)
    assert (config["e"], config["f"], config["g"]) == ({"1": "b'x'"}, "Odd", "an integer of 16610 bits")
    assert config["text"].endswith("[... 83616 more characters]")
    assert run.notices == []


@settings(deadline=None)
@given(st.recursive(st.integers() | st.floats() | st.text() | st.binary() | st.none(), st.lists, max_leaves=20))
def test_a_fitted_configuration_stays_as_it_is(value: Any) -> None:
    fitted = fit_config({"value": value})
    assert fit_config(fitted) == fitted


def test_what_raises_at_one_row_costs_no_other(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sdk.log_at

    def log_at(run: Any, values: dict[str, Any], step: int, time_ns: int) -> None:
        if step == 2:
            raise KeyError("of another version")
        real(run, values, step, time_ns)

    monkeypatch.setattr(sdk, "log_at", log_at)
    run = Delivered("offline", tmp_path, cloud)
    for step in range(5):
        run.write(step, {"x": 1.0})
    assert set(run.finish()["x"]) == {0, 1, 3, 4}
    assert (run.sink.written, run.sink.withheld, len(run.notices)) == (4, 1, 1)
    assert "what was logged at step 2 (KeyError: 'of another version')" in run.notices[0]


def test_a_run_that_cannot_be_opened_at_first_is_complete_in_the_end(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swanlab_run, "OPEN_RETRY_S", (0.05, 0.1))
    real = swanlab.init
    failed: list[Any] = []

    def init(**values: Any) -> Any:
        if len(failed) < 3:
            (tmp_path / values["settings"].run.dir / "media").mkdir(parents=True)  # as SwanLab leaves it behind
            failed.append(values)
            raise OSError("No space left on device")
        return real(**values)

    monkeypatch.setattr(swanlab, "init", init)
    run = Delivered("offline", tmp_path, cloud)
    for step in range(5):
        run.write(step, {"x": 1.0})
    wait_until(lambda: run.sink.written == 5)
    assert run.finish() == {"x": dict.fromkeys(range(5), 1.0)}
    assert run.notices == [
        "SwanLab's run cannot be opened (OSError: No space left on device); it is tried again until the end."
    ]


def test_a_step_that_comes_again_is_not_counted_as_written(tmp_path: Path, cloud: SwanLabCloud) -> None:
    """SwanLab's run on disk keeps the first value, without a word."""
    run = Delivered("offline", tmp_path, cloud)
    for epoch in range(3):
        for step in range(10):
            run.write(step, {"x": float(epoch)})
    assert run.finish() == {"x": dict.fromkeys(range(10), 0.0)}
    assert (run.sink.written, run.sink.withheld) == (10, 20)
    assert run.notices == [
        "SwanLab's run has not taken 20 scalars: it keeps the first value of a step. The journal has all."
    ]


def test_a_consumer_that_has_ended_is_told(tmp_path: Path, cloud: SwanLabCloud) -> None:
    """As with the Stop button of the local dashboard."""
    run = Delivered("offline", tmp_path, cloud)
    run.write(0, {"x": 1.0})
    wait_until(lambda: run.sink.written == 1)
    assert isinstance(run.sink, SwanLabRun)
    run.sink._run._components.consumer.stop()
    run.sink._run._components.consumer.join()
    run.write(1, {"x": 1.0})
    wait_until(lambda: bool(run.notices))
    assert run.notices[0].startswith("SwanLab stopped taking data: its consumer thread has ended")
    run.finish()


def test_what_local_mode_cannot_take_is_thinned_evenly_and_closed_in_time(
    tmp_path: Path, cloud: SwanLabCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swanlab_run, "LOCAL_WAITING", 60)
    monkeypatch.setattr(swanlab_run, "LOCAL_LAG_S", 0.0)
    run = Delivered("local", tmp_path, cloud)
    run.sink.waits = False
    wait_until(lambda: run.sink.run_dir is not None)
    for step in range(400):
        run.write(step, {f"layer{n}": float(step) for n in range(10)} | ({"eval": 1.0} if step % 50 == 0 else {}))
    points = run.finish()
    written = sum(map(len, points.values()))
    assert run.sink.written == written
    assert run.sink.written + run.sink.thinned == 400 * 10 + 8
    assert run.sink.thinned > 2000
    assert ["gets fewer points of each series" in notice for notice in run.notices] == [True]
    for name in (f"layer{n}" for n in range(10)):
        steps = sorted(points[name])
        assert steps[0] < 10
        assert steps[-1] > 250
        assert max(after - before for before, after in itertools.pairwise(steps)) <= 160
    assert len(points["eval"]) >= 3


def test_the_row_that_is_being_written_is_not_mixed_up_by_thinning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue is taken apart and put together while SwanLab's thread is about to take the next row from it."""
    thinning, taken, keep = threading.Event(), threading.Event(), Thinning.keep
    given: list[int] = []

    def slowly(self: Thinning, row: Row) -> Row:
        if self._distance > 1 and not thinning.is_set():
            thinning.set()
            taken.wait(0.3)  # the other thread's time
        return keep(self, row)

    class Opened(SwanLabRun):
        def _open(self) -> None: ...

        def _closing(self) -> float:
            thinning.wait(20)
            return 0.0

        def _write_some(self, first: Row) -> None:
            given.append(first.step)
            taken.set()
            self._forget(1)

        def _close(self, state: State, error: str | None) -> None: ...

    monkeypatch.setattr(Thinning, "keep", slowly)
    run = Opened(ObserverSettings(project="p", mode="local", log_dir=tmp_path), "r", [], print, lambda run: None)
    run.start()
    step = 0
    while not thinning.is_set():
        run.write(step, 0, {"x": 1.0})
        step += 1
    run.finish("success", None)
    assert run.closed.wait(20)
    assert given[0] == 0
    assert len(set(given)) == len(given) == step - run.thinned


def test_a_run_is_closed_before_its_last_rank_stops_waiting() -> None:
    """SwanLab's run, the last notification and the journal, one after the other."""
    longest = ending.CLOSE_DEADLINE_S + telling.LARK_DEADLINE_S + ending.JOURNAL_DEADLINE_S / 2
    assert FINISH_DEADLINE_S < ending.CLOSE_DEADLINE_S
    assert longest + 5 <= FINISH_TIMEOUT_S


def test_a_run_that_is_written_anew_has_no_more_time_than_the_one_before(tmp_path: Path, cloud: SwanLabCloud) -> None:
    first, second = Delivered("offline", tmp_path / "a", cloud), NoSwanLab(print, lambda sink: None)
    first.sink.hurry(7.0)
    second.hurry(first.sink.left())
    assert second.left() <= first.sink.left() + 0.1 <= 7.1
    first.finish()
    second.finish("success", None)


def test_what_cannot_be_thinned_any_more_costs_nothing_for_each_row() -> None:
    """Each row has a name of its own, so that none can be left out."""

    class Counted(deque[Row]):
        passes = 0

        def __iter__(self) -> Iterator[Row]:
            self.passes += 1
            return super().__iter__()

    thinning, rows = Thinning(lambda row: None), Counted()
    for step in range(1000):
        rows.append(thinning.keep(Row(step, 0, {f"x{step}": 1.0})))
        assert thinning.thin(rows, SCALAR_BYTES * len(rows), 10 * SCALAR_BYTES) == SCALAR_BYTES * len(rows)
    assert len(rows) == 1000
    assert rows.passes < 200


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=60), st.integers(1, 40))
def test_thinning_counts_what_it_leaves_out(steps: list[int], scalars: int) -> None:
    lost: list[int] = []
    thinning = Thinning(lambda row: lost.append(len(row.values)))
    rows = deque(Row(step, 0, {"a": 1.0, "b": 2.0}) for step in steps)
    size = thinning.thin(rows, 2 * SCALAR_BYTES * len(steps), SCALAR_BYTES * scalars)
    assert size == sum(row.size for row in rows)
    assert size <= SCALAR_BYTES * scalars or len(rows) == 1
    assert size + SCALAR_BYTES * sum(lost) == 2 * SCALAR_BYTES * len(steps)
    assert rows[0].step == steps[0]


def test_only_runs_of_ours_are_removed(tmp_path: Path) -> None:
    """A journal may name any directory."""

    def run(directory: Path, run_id: str = "r") -> Path:
        directory.mkdir(parents=True)
        (directory / f"run-{run_id}.swanlab").write_text("")
        return directory

    log_dir = tmp_path / "log"
    mine, empty = run(log_dir / "run-1-r"), log_dir / "run-2-r"
    (empty / "media").mkdir(parents=True)
    kept = [
        run(log_dir / "run-3-other", "other"),
        run(log_dir / "mine"),
        run(tmp_path / "run-4-r"),
        run(log_dir / "deeper" / "run-5-r"),
    ]
    (log_dir / "run-6-r").symlink_to(kept[0])
    for directory in [mine, empty, *kept, log_dir / "run-6-r", log_dir / "run-7-none", log_dir / "run-8" / ".." / ".."]:
        remove_run(directory, log_dir, "r")
    assert not mine.exists()
    assert not empty.exists()
    assert all((directory / "run-r.swanlab").exists() or directory == kept[0] for directory in kept)
    assert (kept[0] / "run-other.swanlab").exists()
    assert (log_dir / "run-6-r").is_symlink()


def test_series_begin_at_the_pace_at_which_local_mode_can_begin_them() -> None:
    """Those of a usual training at once; of 3,000 the first ones have all their points, and in time all have some."""
    now = 0.0
    lost: list[int] = []
    beginnings = Beginnings(lambda row: lost.append(len(row.values)), lambda: now)
    values = {f"x{number}": 1.0 for number in range(3000)}
    few = Row(0, 0, {"loss": 1.0})
    assert beginnings.keep(few) is few
    sizes = []
    for step in range(200):
        kept = beginnings.keep(Row(step, 0, values)).values
        sizes.append(len(kept))
        assert list(kept) == list(values)[: len(kept)]
        now += 1.0
    assert sizes[0] == SERIES - 1
    assert sizes[60] == SERIES - 1 + 60 * SERIES_PER_SECOND
    assert sizes[-1] == 3000
    assert sum(sizes) + sum(lost) == 200 * 3000
