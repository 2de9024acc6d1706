from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from swanlab_ray.actors.reduction import aggregate
from swanlab_ray.actors.reduction import over_ranks as over_ranks_module
from swanlab_ray.actors.reduction import written as written_module
from swanlab_ray.actors.reduction.aggregate import DEADLINE_S, Aggregator
from swanlab_ray.actors.reduction.written import NOBODY, Group
from swanlab_ray.actors.wire.events import JOB, RANK, USER, Scalars


class Written:
    """An aggregator and what it has written: ``{name: {step: value}}``."""

    def __init__(self, world: int, rank_series: int = 16, missing: int = 0) -> None:
        self.values: dict[str, dict[int, float]] = {}
        self.aggregator = Aggregator(self._emit, rank_series)
        self.aggregator.set_ranks(set(range(world)), missing)

    def _emit(self, step: int, time_ns: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            steps = self.values.setdefault(name, {})
            assert step not in steps, f"{name} written twice at {step}"
            steps[step] = value

    def log(self, rank: int, step: int, scope: int = USER, now: float = 0.0, **values: float) -> None:
        self.aggregator.add(rank, Scalars(step, 1, scope, values), now)


def over_ranks(*values: float) -> dict[str, float]:
    """What is written of a name over ranks."""
    written = Written(world=len(values))
    for rank, value in enumerate(values):
        written.log(rank, 1, x=value)
    prefix = "ranks/x/"
    return {name.removeprefix(prefix): steps[1] for name, steps in written.values.items() if name.startswith(prefix)}


def test_a_step_is_written_when_every_rank_has_reported_it() -> None:
    written = Written(world=3)
    for rank in range(2):
        written.log(rank, 1, x=rank)
    assert not written.values
    written.log(2, 1, x=2)
    assert written.values["x"] == written.values["ranks/x/mean"] == {1: 1.0}
    assert written.values["rank/2/x"] == {1: 2.0}
    assert written.values["ranks/x/argmax"] == {1: 2.0}


def test_what_one_rank_logs_alone_stands_under_its_name_only() -> None:
    written = Written(world=2)
    written.log(0, 1, only=5.0)
    written.log(0, 2, only=6.0)
    written.log(1, 2, other=1.0)
    written.aggregator.tick(0.0)
    assert written.values == {"only": {1: 5.0}}
    written.aggregator.flush()
    assert written.values == {"only": {1: 5.0, 2: 6.0}, "other": {2: 1.0}}


def test_trainer_logs_pass_as_they_are() -> None:
    written = Written(world=2)
    written.log(0, 1, scope=JOB, loss=2.0)
    assert written.values == {"loss": {1: 2.0}}


def test_a_rank_s_own_measurement_has_no_plain_name() -> None:
    written = Written(world=2)
    written.log(0, 1, scope=RANK, step_time=1.0)
    written.log(1, 1, scope=RANK, step_time=3.0)
    assert "step_time" not in written.values
    assert written.values["ranks/step_time/max"] == {1: 3.0}
    alone = Written(world=1)
    alone.log(0, 1, scope=RANK, step_time=1.0)
    assert alone.values == {"rank/0/step_time": {1: 1.0}}


def test_a_silent_rank_delays_a_step_until_the_deadline_and_its_late_value_is_kept() -> None:
    written = Written(world=2)
    written.log(1, 0, x=0.0)  # so that both ranks are known to log it
    written.log(0, 0, x=0.0)
    written.log(0, 1, x=4.0, now=10.0)
    written.aggregator.tick(10.0 + DEADLINE_S - 0.1)
    assert 1 not in written.values["x"]
    written.aggregator.tick(10.0 + DEADLINE_S)
    assert written.values["x"][1] == 4.0
    written.log(1, 1, x=8.0, now=50.0)
    assert written.values["x"][1] == 4.0
    assert written.values["rank/1/x"][1] == 8.0
    assert written.aggregator.late == 1


def test_a_rank_that_ended_is_not_waited_for() -> None:
    written = Written(world=2)
    written.log(0, 1, x=1.0)
    written.log(1, 1, x=3.0)
    written.log(0, 2, x=5.0)
    written.aggregator.set_ranks({0}, 0)
    written.log(0, 3, x=5.0)
    written.aggregator.tick(0.0)
    assert written.values["x"] == {1: 2.0, 2: 5.0, 3: 5.0}


def test_a_rank_that_left_does_not_stand_in_for_one_that_is_there() -> None:
    written = Written(world=3)
    written.log(2, 9, x=1.0)
    written.aggregator.set_ranks({0, 1}, 0)
    written.log(0, 9, x=1.0)
    assert not written.values
    written.log(1, 9, x=100.0)
    assert written.values["x"] == {9: 34.0}


def test_waiting_steps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate, "WAITING_STEPS", 10)
    written = Written(world=2)
    for step in range(100):
        written.log(0, step, x=1.0)
    assert len(written.values["x"]) == 90


def test_waiting_values_are_bounded_and_the_first_step_that_came_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate, "WAITING_VALUES", 20)
    written = Written(world=2)
    names = {f"n{number}": 1.0 for number in range(5)}
    most = 0
    for step in (9, *range(8), *range(10, 40)):
        written.aggregator.add(0, Scalars(step, 1, USER, names), 0.0)
        most = max(most, written.aggregator._values)
    assert most == 25
    steps = list(written.values["n0"])
    assert steps == [9, *range(8), *range(10, 35)]
    written.aggregator.flush()
    assert written.aggregator._values == 0
    assert not written.aggregator.waiting


def test_each_name_waits_for_all_ranks_also_where_they_log_it_beside_others() -> None:
    written = Written(world=2)
    written.log(0, 1, a=1.0, b=2.0)
    written.log(1, 1, a=3.0)
    assert (written.values["a"], "b" in written.values) == ({1: 2.0}, False)
    written.log(1, 1, b=4.0)
    assert written.values["b"] == {1: 3.0}
    assert not written.aggregator.waiting


def test_huge_values_do_not_overflow() -> None:
    assert over_ranks(1.5e308, 1.5e308)["mean"] == 1.5e308


def test_what_ranks_had_logged_before_they_left_is_reduced_together() -> None:
    written = Written(world=3)
    written.log(0, 5, x=0.0)
    written.log(1, 5, x=10.0)
    written.aggregator.set_ranks({0}, 0)
    written.log(0, 5, y=1.0)
    written.aggregator.flush()
    assert written.values["x"] == {5: 5.0}
    assert written.aggregator.late == 0


def test_ranks_that_have_not_arrived_are_waited_for() -> None:
    written = Written(world=1, missing=1)
    written.log(0, 1, x=1.0)
    written.log(0, 2, x=1.0)
    written.aggregator.tick(0.0)
    assert not written.values
    written.aggregator.set_ranks({0, 1}, 0)
    written.log(1, 1, x=3.0)
    assert written.values["x"] == {1: 2.0}


def test_one_giant_step_poisons_nothing() -> None:
    written = Written(world=2)
    written.log(0, 10**9, x=1.0)
    written.aggregator.tick(DEADLINE_S)
    for rank in range(2):
        written.log(rank, 1, x=rank, now=DEADLINE_S)
    assert written.values["x"][1] == 0.5
    assert written.aggregator.late == 0


@pytest.mark.parametrize(("limit", "series"), [(0, set()), (2, {"rank/0/x", "rank/1/x"})])
def test_single_series_up_to_the_limit(limit: int, series: set[str]) -> None:
    written = Written(world=3, rank_series=limit)
    for rank in range(3):
        written.log(rank, 1, x=1.0)
    assert {name for name in written.values if name.startswith("rank/")} == series


def test_reduction_over_ranks() -> None:
    reduced = over_ranks(*(float(rank) for rank in range(100)))
    assert reduced == {"mean": 49.5, "min": 0.0, "max": 99.0, "p95": 94.0, "argmax": 99.0}


def test_nan_of_one_rank_does_not_hide_the_others() -> None:
    reduced = over_ranks(1.0, math.nan, 3.0)
    assert (reduced["mean"], reduced["max"], reduced["argmax"], reduced["nonfinite"]) == (2.0, 3.0, 2.0, 1.0)
    reduced = over_ranks(math.nan, math.inf)
    assert reduced.keys() == {"mean", "nonfinite"}
    assert math.isnan(reduced["mean"])


def test_argmax_of_equals_is_the_lowest_rank() -> None:
    assert over_ranks(2.0, 2.0)["argmax"] == 0.0


# A rank that goes back.


def test_what_waits_when_a_rank_goes_back_is_replaced_and_not_passed() -> None:
    written = Written(world=2)
    for rank in range(2):
        written.log(rank, 0, x=0.0)
    written.log(0, 5, x=1.0)
    written.log(0, 9, x=1.0)
    written.log(1, 9, x=1.0)
    written.aggregator.rewind(0, 5)
    written.aggregator.tick(0.0)
    assert 5 not in written.values["x"], "it comes again"
    written.log(0, 5, x=3.0)
    assert (written.aggregator.replaced, written.aggregator.repeated) == (1, 0)
    written.log(0, 5, x=4.0)
    assert (written.aggregator.replaced, written.aggregator.repeated) == (1, 1)
    written.log(1, 5, x=5.0)
    assert written.values["x"][5] == 4.0


def test_a_rank_that_went_back_passes_no_step_that_it_has_not_run_again() -> None:
    written = Written(world=2)
    for rank in range(2):
        written.log(rank, 0, x=0.0)
    for step in (3, 4, 5):
        written.log(1, step, x=0.0)
    written.log(0, 9, x=0.0)
    written.aggregator.passed(1, 9)
    written.aggregator.rewind(0, 5)
    written.aggregator.tick(0.0)
    assert written.values["x"].keys() == {0, 3}, "rank 0 is in step 4, as far as anybody knows"
    written.log(0, 6, x=0.0)
    written.aggregator.tick(0.0)
    assert written.values["x"].keys() == {0, 3, 4, 5}


def test_values_written_again_are_of_all_ranks_that_ran_the_step_again() -> None:
    """Names that only one of them logs again leave the others as they were."""
    again: list[tuple[int, dict[str, float]]] = []
    written = Written(world=2)
    written.aggregator._emit_again = lambda step, time_ns, values: again.append((step, values))
    for rank in range(2):
        written.log(rank, 3, x=float(rank), y=float(rank))
    for rank in range(2):
        written.aggregator.rewind(rank, 3)
    assert again == []
    written.log(0, 3, x=10.0)
    assert again == [], "rank 1 runs it again too"
    written.log(1, 3, x=20.0)
    ((step, values),) = again
    assert (step, values["x"], values["ranks/x/argmax"]) == (3, 15.0, 1.0)
    assert not any("y" in name.split("/") for name in values)
    written.log(0, 3, x=99.0)
    assert len(again) == 1
    assert (written.aggregator.repeated, written.aggregator.late) == (1, 0)


# The view over ranks of what is measured, beside what the user logs under the same name.


def test_a_measurement_and_the_user_s_value_of_one_name_share_no_series() -> None:
    """From the first measurement on the view over ranks is its own; before it was the user's."""
    written = Written(world=2)
    for step, scopes in ((1, (USER,)), (2, (RANK, USER)), (3, (USER, RANK))):
        for scope in scopes:
            for rank in range(2):
                written.log(rank, step, scope=scope, loss=float(rank + (10 if scope == RANK else 100)))
    assert written.values["loss"] == {1: 100.5, 2: 100.5, 3: 100.5}
    assert written.values["ranks/loss/mean"] == {1: 100.5, 2: 10.5, 3: 10.5}
    assert written.values["ranks/loss/min"] == {1: 100.0, 2: 10.0, 3: 10.0}
    assert written.values["rank/1/loss"] == {1: 101.0, 2: 11.0, 3: 11.0}
    for scope in (RANK, USER):
        for rank in range(2):
            written.log(rank, 1, scope=scope, speed=float(rank + (10 if scope == RANK else 100)))
    assert (written.values["speed"], written.values["ranks/speed/mean"]) == ({1: 100.5}, {1: 10.5})


# Who is told of what.


def test_nan_is_told_once_for_a_name_and_step_with_the_lowest_rank_that_has_it() -> None:
    told: list[tuple[int, str, int, int, float]] = []
    aggregator = Aggregator(lambda *row: None, 16, on_nonfinite=lambda *what: told.append(what))
    aggregator.set_ranks({0, 1, 2}, 0)
    for rank, value in enumerate((1.0, math.inf, math.nan)):
        aggregator.add(rank, Scalars(1, 100 + rank, USER, {"x": value, "y": 1.0}), 0.0)
    for rank, value in enumerate((1.0, 2.0, -math.inf)):  # in calls of their own
        aggregator.add(rank, Scalars(2, 200 + rank, USER, {"x": value}), 0.0)
        aggregator.add(rank, Scalars(2, 200 + rank, USER, {"y": value}), 0.0)
    aggregator.flush()
    assert told == [(1, "x", 1, 101, math.inf), (2, "x", 2, 202, -math.inf), (2, "y", 2, 202, -math.inf)]


def test_a_repeated_value_is_told_with_its_rank_name_and_step() -> None:
    told: list[tuple[int, str, int]] = []
    aggregator = Aggregator(lambda *row: None, 16, on_repeated=lambda *what: told.append(what))
    aggregator.set_ranks({0}, 0)
    for value in range(3):
        aggregator.add(0, Scalars(7, 1, USER, {"x": float(value), "y": 1.0}), 0.0)
    assert told == [(0, name, 7) for _ in range(2) for name in "xy"]


# What is remembered of what was written.


def test_of_steps_that_are_forgotten_only_the_first_value_of_a_rank_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_module, "STEPS_KEPT", 2)
    remembered = written_module.Written()
    for step in (1, 2, 3):
        remembered.add(step, frozenset("ab"), Group(frozenset({0}), NOBODY))
    assert [remembered.forgotten(step, "a") for step in (0, 1, 2, 3)] == [True, True, False, False]
    assert not remembered.forgotten(1, "c")
    assert (remembered.floor, remembered.certain, remembered.lowered) == (2, 2, 0)
    assert remembered.find(1, "a") is None
    assert remembered.find(2, "a") == Group(frozenset({0}), NOBODY)
    assert remembered.find(2, "c") is None
    assert not remembered.first_below(0, 1, "a"), "rank 0 had logged up to there"
    assert not remembered.first_below(0, 0, "a")
    assert remembered.first_below(1, 0, "a")
    assert not remembered.first_below(1, 0, "a")
    assert remembered.first_below(1, 0, "b")
    assert remembered.first_below(1, 1, "a")
    assert not remembered.first_below(1, 1, "a")
    assert not remembered.first_below(1, 0, "c"), "it is beyond that"
    assert remembered.holds(0, 2, "ab")
    assert not remembered.holds(1, 2, "ab")
    assert remembered.holds(1, 1, "ab"), "it may be"


def test_the_first_step_of_all_is_forgotten_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_module, "STEPS_KEPT", 1)
    remembered = written_module.Written()
    for step in (0, 1):
        remembered.add(step, frozenset("a"), Group(frozenset({0}), NOBODY))
    assert [remembered.forgotten(step, "a") for step in (0, 1)] == [True, False]


def test_names_are_forgotten_by_their_number_but_never_the_highest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_module, "NAMES_KEPT", 10)
    remembered = written_module.Written()
    for step in (5, 1, 9):
        remembered.add(step, frozenset(f"{step}/{n}" for n in range(5)), Group(frozenset({0}), NOBODY))
    assert (remembered.at(1), remembered._names) == (None, 10)
    assert remembered.at(5) is not None
    remembered.add(9, frozenset(f"more/{n}" for n in range(20)), Group(frozenset({0}), NOBODY))
    assert (remembered.at(5), remembered._names) == (None, 25)
    assert remembered.floor == 6


def test_names_of_a_step_part_when_some_are_reopened_or_joined() -> None:
    remembered = written_module.Written()
    remembered.add(1, frozenset("abc"), Group(frozenset({0, 1}), NOBODY))
    remembered.join(2, 1, frozenset("ax"))
    assert remembered.find(1, "a") == Group(frozenset({0, 1, 2}), NOBODY)
    assert remembered.find(1, "b") == remembered.find(1, "c") == Group(frozenset({0, 1}), NOBODY)
    remembered.reopen(1, "b")
    assert remembered.find(1, "b") is None
    assert remembered.find(1, "c") == Group(frozenset({0, 1}), NOBODY)
    assert remembered._names == 2
    remembered.rewind(0, 1)
    assert remembered.find(1, "a") == Group(frozenset({1, 2}), frozenset({0}))
    assert remembered.find(1, "c") == Group(frozenset({1}), frozenset({0}))
    remembered.rewind(1, 2)
    assert remembered.find(1, "c") == Group(frozenset({1}), frozenset({0}))


def test_who_goes_back_beyond_what_is_remembered_may_write_all_of_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_module, "STEPS_KEPT", 2)
    remembered = written_module.Written()
    for step in range(10):
        remembered.add(step, frozenset("a"), Group(frozenset({0}), NOBODY))
    assert (remembered.floor, remembered.certain) == (8, 8)
    remembered.rewind(0, 8)
    assert (remembered.floor, remembered.lowered, remembered.certain) == (8, 0, 8)
    remembered.rewind(0, 4)
    assert (remembered.floor, remembered.lowered, remembered.certain) == (4, 8, 8)
    assert [remembered.forgotten(step, "a") for step in (3, 4)] == [True, False]
    remembered.rewind(0, 6)
    assert (remembered.floor, remembered.lowered) == (4, 8)


OPERATIONS = st.one_of(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, 3),
        st.sampled_from([USER, RANK]),
        st.dictionaries(st.sampled_from("abc"), st.floats(allow_nan=False, allow_infinity=False), min_size=1),
    ),
    st.sets(st.integers(0, 2), min_size=1),
    st.sampled_from(["tick", "late tick", "again", "rewind"]),
)


@settings(deadline=None)
@given(st.lists(OPERATIONS, max_size=30))
@example([(0, 0, USER, {"a": 0.0}), (0, 0, USER, {"a": 0.0, "b": 0.0}), (1, 0, USER, {"a": 0.0})])
def test_values_logged_in_one_call_and_one_by_one_are_the_same(operations: list[Any]) -> None:
    """Whatever else happens: ranks leave and come, steps are closed, a rank begins anew, names are forgotten."""

    def written(
        parts: Callable[[dict[str, float]], list[dict[str, float]]],
    ) -> tuple[list[tuple[int, str, float]], int, int]:
        rows: list[tuple[int, str, float]] = []
        aggregator = Aggregator(lambda step, _, row: rows.extend((step, *item) for item in row.items()), 16)
        aggregator.set_ranks({0, 1, 2}, 0)
        for operation in operations:
            match operation:
                case (rank, step, scope, values):
                    for part in parts({f"{key}{scope}": value for key, value in values.items()}):
                        aggregator.add(rank, Scalars(step, 1, scope, part), 0.0)
                case set():
                    aggregator.set_ranks(operation, 0)
                case "again":
                    aggregator.restart_rank(0)
                case "rewind":
                    aggregator.rewind(0, 1)
                case _:
                    aggregator.tick(0.0 if operation == "tick" else DEADLINE_S)
        aggregator.flush()
        return sorted(rows), aggregator.late, aggregator._values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(over_ranks_module, "SHAPES", 2)
        together = written(lambda values: [values])
        assert together == written(lambda values: [{key: values[key]} for key in values])
    assert together[2] == 0
