"""Spans of all ranks to series: which steps of a name are written, who is waited for, what a resumed pass replaces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from swanlab_ray.actors.journal.records import Arrived, Batch, Entry
from swanlab_ray.actors.reduction import supersession as supersession_module
from swanlab_ray.actors.reduction import timings
from swanlab_ray.actors.reduction.aggregate import DEADLINE_S
from swanlab_ray.actors.reduction.reduction import Reduction
from swanlab_ray.actors.reduction.supersession import Supersession, supersession
from swanlab_ray.actors.reduction.timings import Timings
from swanlab_ray.actors.wire.codec import decode_batch, encode_batch
from swanlab_ray.actors.wire.events import PROGRESS, SCALARS, SPANS, USER, Event, Scalars, Spans
from swanlab_ray.observer.encoding.numbers import encode
from tests.incarnations import settings_for
from tests.test_reduction import Reduced
from tests.test_spans import spans_at


def all_of_it(scalars: Scalars) -> Scalars:
    return scalars


class Reported:
    """Timings of some ranks, and what they wrote: ``{name: {step: value}}``."""

    def __init__(self, world: int) -> None:
        self.values: dict[str, dict[int, float]] = {}
        self.again: list[tuple[int, dict[str, float]]] = []
        self.said: list[str] = []
        self.timings = Timings(self._emit, self.said.append, lambda step, _, values: self.again.append((step, values)))
        self.timings.set_ranks(set(range(world)), 0)

    def _emit(self, step: int, time_ns: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            assert step not in self.values.setdefault(name, {}), f"{name} written twice at {step}"
            self.values[name][step] = value

    def take(self, rank: int, *records: tuple[str, int, int, int], now: float = 0.0) -> None:
        self.timings.take(rank, spans_at(*records), now, all_of_it)

    def steps(self, name: str) -> list[int]:
        return list(self.values.get(name, {}))


# At which steps a name is written.


def test_a_name_is_written_at_the_same_steps_of_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once, then one a second by the clock of the first rank; a second rank decides nothing anew."""
    monkeypatch.setattr(timings, "BURST", 2)
    pace = timings._Pace()
    assert [pace.due(step, now=100.0) for step in range(4)] == [True, True, False, False]
    assert [pace.due(step, now=200.0) for step in range(4)] == [True, True, False, False]
    assert pace.due(4, now=101.0)
    assert not pace.due(5, now=101.9)
    assert not pace.due(6, now=50.0), "a clock that was set back lets no time pass"
    assert pace.due(7, now=102.0)
    assert [pace.due(step, now=200.0) for step in (8, 9, 10)] == [True, True, False], "no more than two are saved up"


def test_decisions_are_bounded_and_a_rank_that_is_far_behind_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "DECIDED_STEPS", 3)
    pace = timings._Pace()
    assert all(pace.due(step, 0.0) for step in (0, 2, 1, 5, 7))
    assert sorted(pace._decided) == [2, 5, 7]
    assert not pace.due(1, 0.0)
    assert pace.due(2, 0.0)
    assert pace.due(3, 0.0), "nobody has decided on that yet"
    assert sorted(pace._decided) == [3, 5, 7]
    pace.rewind(9)
    assert not pace.due(2, 0.0)
    pace.rewind(1)
    assert pace.due(1, 0.0), "it is run again"
    assert not pace.due(0, 0.0)


def test_names_beyond_a_bound_get_no_series_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "NAMES", 2)
    made = Reported(1)
    for step in range(3):
        made.take(
            0, *((f"n{number}", step, step * 100 + number * 10, step * 100 + number * 10 + 1) for number in range(4))
        )
    made.timings.end_rank(0, 0.0, all_of_it)
    assert made.values == {f"profiling/n{number}": pytest.approx(dict.fromkeys(range(3), 0.001)) for number in range(2)}
    assert made.said == ["There are more than 2 names of spans; of the others SwanLab gets no series."]


# Over ranks.


def test_times_are_the_mean_with_the_largest_beside_it_and_nothing_by_rank() -> None:
    made = Reported(2)
    for rank in range(2):
        made.take(rank, ("forward", 1, 0, 10 + 20 * rank), ("forward", 2, 50, 60))
    assert made.values == {
        "profiling/forward": {1: pytest.approx(0.020)},
        "ranks/profiling/forward/max": {1: pytest.approx(0.030)},
        "ranks/profiling/forward/p95": {1: pytest.approx(0.030)},
        "ranks/profiling/forward/argmax": {1: 1.0},
        "ranks/straggler": {1: -1.0},
        "ranks/straggler_score": {1: 0.0},
    }


def report(made: Reported, rank: int, *steps: int, name: str = "forward") -> None:
    made.take(rank, *((name, step, step * 100, step * 100 + 10) for step in steps))


def test_a_rank_without_spans_is_passed_by_the_step_that_it_says_it_is_at() -> None:
    made = Reported(2)
    report(made, 0, 1, 2, 3, 4)
    made.timings.passed(1, 2)
    made.timings.tick(3.0)
    assert made.steps("profiling/forward") == [1]
    assert made.timings.waiting
    made.timings.passed(1, 3)
    made.timings.tick(3.0)
    assert made.steps("profiling/forward") == [1, 2]


def test_spans_of_a_rank_may_come_later_than_it_says_its_step() -> None:
    made = Reported(2)
    report(made, 1, 0, 1)
    report(made, 0, 1, 2)
    made.timings.passed(1, 9)
    made.timings.tick(DEADLINE_S / 2)
    report(made, 1, 2)
    assert made.values["ranks/profiling/forward/max"].keys() == {1}
    assert made.timings.late == 0


def test_a_rank_passes_a_step_of_which_nothing_of_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names are not due there."""
    monkeypatch.setattr(timings, "BURST", 1)
    made = Reported(2)
    report(made, 0, 1, 2, 3)
    assert made.steps("profiling/forward") == []
    report(made, 1, 2, 3)
    made.timings.tick(3.0)
    assert made.steps("profiling/forward") == [1]


def test_a_rank_that_is_over_says_its_last_step_and_is_not_waited_for() -> None:
    made = Reported(2)
    for rank in range(2):
        report(made, rank, 1, 2)
    assert made.steps("profiling/forward") == [1]
    made.timings.end_rank(1, 0.0, all_of_it)
    made.timings.end_rank(1, 0.0, all_of_it)
    made.timings.set_ranks({0}, 0)
    made.timings.end_rank(0, 0.0, all_of_it)
    assert made.values["ranks/profiling/forward/max"].keys() == {1, 2}
    made.timings.flush()
    assert made.steps("profiling/forward") == [1, 2]


def test_a_new_life_of_a_rank_has_none_of_the_spans_of_the_one_before() -> None:
    made = Reported(1)
    report(made, 0, 1, 2)
    made.timings.restart_rank(0)
    report(made, 0, 5, 6)
    made.timings.end_rank(0, 0.0, all_of_it)
    assert made.steps("profiling/forward") == [1, 5, 6]


def test_steps_that_are_run_again_replace_what_was_written() -> None:
    made = Reported(1)
    report(made, 0, 1, 2, 3)
    made.timings.end_rank(0, 0.0, all_of_it)
    made.timings.rewind(0, 2)
    made.take(0, ("forward", 2, 400, 450), ("forward", 3, 500, 550))
    made.timings.end_rank(0, 0.0, all_of_it)
    assert made.steps("profiling/forward") == [1, 2, 3]
    assert {step: values["profiling/forward"] for step, values in made.again} == pytest.approx({2: 0.05, 3: 0.05})
    assert (made.timings.late, made.timings.repeated) == (0, 0)


def test_spans_that_a_rank_had_to_drop_are_counted_with_those_of_no_step() -> None:
    made = Reported(1)
    event = spans_at(("a", -1, 0, 1), ("a", 1, 0, 1))
    fields = {name: getattr(event, name) for name in event.__struct_fields__} | {"dropped": 7}
    made.timings.take(0, Spans(**fields), 0.0, all_of_it)
    assert made.timings.dropped == 8


def wait_for(made: Reported, slow: int, steps: range, world: int = 3) -> None:
    """In each of these steps one rank works three times as long, and the others wait for it at the end."""
    for step in steps:
        begin = 1000 * step
        for rank in range(world):
            done = begin + (300 if rank == slow else 100)
            made.take(rank, ("forward", step, begin, done), ("backward", step, done, begin + 400))


def test_who_is_waited_for_is_told_of_the_ranks_that_are_there() -> None:
    made = Reported(3)
    wait_for(made, 1, range(30))
    assert made.timings.straggler is not None
    assert (made.timings.straggler.rank, made.timings.straggler.phase) == (1, "forward")
    assert set(made.values["ranks/straggler"].values()) == {1.0}
    assert made.values["ranks/straggler_score"][20] == pytest.approx(0.2)
    made.timings.restart_rank(1)
    assert [made.timings.straggler] == [None], "it may be another machine now"
    made.timings.set_ranks({0, 2}, 0)
    wait_for(made, 0, range(40, 60), world=1)
    assert 45 not in made.values["ranks/straggler"], "of rank 2 nothing is known"
    made.timings.set_ranks({0, 1}, 1)
    wait_for(made, 0, range(70, 90), world=2)
    assert 75 not in made.values["ranks/straggler"], "one has not arrived"
    made.timings.set_ranks({0, 1}, 0)
    wait_for(made, 0, range(100, 120), world=2)
    assert made.values["ranks/straggler"][110] == 0.0


# What a later pass has replaced.


def scalars(step: int, **values: float) -> bytes:
    return encode((SCALARS, step, 1, USER, values))


def batch_of(seq: int, *events: bytes, rank: int = 0, life: str = "a") -> Batch:
    return Batch(rank, life, seq, 1, len(events), encode_batch(events))


def arrived(life: str, rank: int = 0) -> Arrived:
    return Arrived(rank=rank, world_size=1, life=life, local_rank=0, host="h", pid=1, pid_namespace="n", time_ns=1)


def found_in(*entries: Entry) -> Supersession:
    """What reading a run of these entries finds."""
    with pytest.MonkeyPatch.context() as patch:

        def merged(run: object) -> Iterator[Entry]:
            yield from entries

        patch.setattr(supersession_module, "merged", merged)
        return supersession(None)  # type: ignore[arg-type]


def parts_of(found: Supersession, batch: Batch) -> list[tuple[str, list[int]]]:
    events: list[Event] = decode_batch(batch.data)[0]
    return [(life, [getattr(event, "step", -1) for event in part]) for life, part in found.parts(batch, events)]


def test_a_batch_in_which_a_training_goes_back_twice_has_three_parts() -> None:
    batches = [
        batch_of(0, *(scalars(step, x=1.0) for step in range(4))),
        batch_of(1, *(scalars(step, x=2.0) for step in (4, 2, 3, 4, 1, 2))),
        batch_of(2, scalars(3, x=3.0)),
    ]
    found = found_in(arrived("a"), *batches)
    assert parts_of(found, batches[0]) == [("a", [0, 1, 2, 3])]
    assert parts_of(found, batches[1]) == [("a", [4]), ("a, pass 1", [2, 3, 4]), ("a, pass 2", [1, 2])]
    assert parts_of(found, batches[2]) == [("a, pass 2", [3])]
    assert [found.stands(0, "a", step, "x") for step in (0, 1, 4)] == [True, False, False]
    assert [found.stands(0, "a, pass 1", step, "x") for step in (0, 1)] == [True, False]
    assert found.stands(0, "a, pass 2", 4, "x")
    assert found.stands(0, "a", 4, "y"), "no later pass has logged that"


def test_what_a_trainer_says_it_is_at_is_run_again_from_the_next_step_on() -> None:
    progress = [encode((PROGRESS, step, 9, None)) for step in range(1, 7)]
    events = [one for step in range(1, 7) for one in (progress[step - 1], scalars(step, x=1.0))]
    batch = batch_of(0, *events, progress[2], scalars(4, x=2.0))
    found = found_in(arrived("a"), batch)
    assert [life for life, _ in parts_of(found, batch)] == ["a", "a, pass 1"]
    assert parts_of(found, batch)[1] == ("a, pass 1", [3, 4])
    assert [found.stands(0, "a", step, "x") for step in (3, 4, 6)] == [True, False, False]
    events = [one for step in range(1, 7) for one in (progress[step - 1], scalars(step, x=1.0, z=1.0))]
    batch = batch_of(0, *events, progress[2], scalars(4, x=2.0), scalars(5, x=2.0), scalars(4, z=2.0))
    found = found_in(arrived("a"), batch)
    assert [len(part) for _, part in parts_of(found, batch)] == [12, 4], (
        "what comes in another order is not logged again"
    )


def test_what_a_life_that_is_over_says_late_turns_nothing() -> None:
    """Its spool arrives when the next one is at work."""
    late = batch_of(1, scalars(2, x=1.0), scalars(1, x=1.0), life="a")
    found = found_in(
        arrived("a"),
        batch_of(0, *(scalars(step, x=1.0) for step in range(3)), life="a"),
        arrived("b"),
        batch_of(0, scalars(3, x=2.0), life="b"),
        late,
        batch_of(1, scalars(4, x=2.0), life="b"),
        arrived("b"),  # told once more
    )
    assert parts_of(found, late) == [("a", [2, 1])]
    assert [found.stands(0, "a", step, "x") for step in (2, 3)] == [True, False]
    assert found.standing(0, "a", Scalars(3, 1, USER, {"x": 1.0, "y": 2.0})) == Scalars(3, 1, USER, {"y": 2.0})
    assert found.standing(0, "a", Scalars(3, 1, USER, {"x": 1.0})) is None
    whole = Scalars(2, 1, USER, {"x": 1.0})
    assert found.standing(0, "a", whole) is whole
    assert found.standing(1, "never heard of", whole) is whole


def test_the_open_spans_of_a_pass_that_went_back_are_those_of_that_pass() -> None:
    """When the run is written anew: what the first pass did at step 3 is replaced, and what the second did stands."""
    first = [scalars(step, x=1.0) for step in range(4)]
    spans = [
        encode((SPANS, *(getattr(spans_at(*at), name) for name in Spans.__struct_fields__)))
        for at in (
            [("forward", step, 100 * step, 100 * step + 10) for step in (1, 2, 3)],
            [("forward", step, 1000 + 100 * step, 1000 + 100 * step + 50) for step in (2, 3)],
        )
    ]
    batches = [batch_of(0, *first, spans[0]), batch_of(1, scalars(2, x=2.0), spans[1], scalars(3, x=2.0))]
    run = Reduced(world=0)
    run.reduction = Reduction(run, settings_for(Path()), superseded=found_in(arrived("a"), *batches))
    run.reduction.take(arrived("a"))
    for batch in batches:
        run.reduction.take(batch)
    run.reduction.flush()
    assert run.points["x"] == {0: 1.0, 1: 1.0, 2: 2.0, 3: 2.0}
    assert run.points["profiling/forward"] == pytest.approx({1: 0.01, 2: 0.05, 3: 0.05})
