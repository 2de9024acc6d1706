"""From a run's entries to rows: whatever order, clocks and steps they come with."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from swanlab_ray.actors.completions.tables import Table
from swanlab_ray.actors.journal.records import Arrived, Batch, Ended, Tick
from swanlab_ray.actors.reduction import written
from swanlab_ray.actors.reduction.aggregate import DEADLINE_S, PATIENCE_S
from swanlab_ray.actors.reduction.clock import LEAP_S, Clock
from swanlab_ray.actors.reduction.reduction import Reduction
from swanlab_ray.actors.wire.codec import encode_batch
from swanlab_ray.actors.wire.events import (
    PROGRESS,
    RANK,
    SCALARS,
    USER,
    Completions,
    Config,
    Event,
    Progress,
    Scalars,
    Spans,
)
from swanlab_ray.actors.wire.status import REPEATED
from swanlab_ray.observer.encoding.numbers import encode
from tests.incarnations import settings_for

S = 10**9
TODAY = 1_790_000_000.0


class Reduced:
    """A reduction of some ranks and what came out of it; ``now`` is the writer's clock, in Unix seconds."""

    def __init__(self, world: int = 2, **values: Any) -> None:
        self.points: dict[str, dict[int, float]] = {}
        self.at: dict[tuple[str, int], float] = {}
        self.own: Counter[float] = Counter()
        self.tables: list[Table] = []
        self.told: list[str] = []
        self.configs: list[dict[str, Any]] = []
        self.replaced = 0
        self.now = TODAY
        self.seq: Counter[str] = Counter()
        self.reduction = Reduction(
            self,
            settings_for(Path(), **({"rank_series": 16} | values)),
            notice=self.told.append,
            emit_again=self._write_again,
        )
        for number in range(world):
            self.arrive(number, f"a{number}", world)

    def write(self, step: int, time_ns: int, values: dict[str, float], table: Table | None = None) -> None:
        if table is not None:
            self.tables.append(table)
        for name in values:
            assert step not in self.points.setdefault(name, {}), f"{name} written twice at step {step}"
        self._take(step, values)

    def _write_again(self, step: int, time_ns: int, values: dict[str, float]) -> None:
        self.replaced += len(values)
        self._take(step, values)

    def _take(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.points.setdefault(name, {})[step] = value
            self.at[name, step] = self.now
            if name.startswith("rank/") or ("/" not in name and f"ranks/{name}/mean" not in values):
                self.own[value] += 1

    def config(self, values: dict[str, Any]) -> None:
        if "raises" in values:
            raise RuntimeError("SwanLab does not like it")
        self.configs.append(values)

    def arrive(self, number: int, life: str, world: int) -> None:
        arrived = Arrived(rank=number, world_size=world, life=life, local_rank=0, host="h", pid=1, pid_namespace="n")
        self.reduction.take(arrived)

    def take(self, number: int, events: list[Event]) -> None:
        """A batch of these events, whatever decoding would have said of them."""
        batch = Batch(number, f"a{number}", self.seq[f"a{number}"], int(self.now * S), len(events), b"")
        self.seq[f"a{number}"] += 1
        self.reduction.take(batch, events)

    def send(self, number: int, *events: Any, life: str | None = None) -> None:
        life = life or f"a{number}"
        batch = Batch(number, life, self.seq[life], int(self.now * S), len(events), encode_batch(map(encode, events)))
        self.seq[life] += 1
        self.reduction.take(batch)

    def log(self, number: int, step: int, scope: int = USER, **values: float) -> None:
        self.send(number, (SCALARS, step, 1, scope, values))

    def wait(self, seconds: float) -> None:
        """Time passes, and nothing else."""
        for _ in range(int(seconds / 0.5)):
            self.now += 0.5
            self.reduction.take(Tick(time_ns=int(self.now * S)))


# What is late.


def test_a_late_value_of_a_step_closed_long_ago_does_not_replace_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spool that arrives hours later, of a rank whose machine was cut off."""
    monkeypatch.setattr(written, "STEPS_KEPT", 100)
    run = Reduced()
    for step in range(50):
        for number in range(2):
            run.log(number, step, x=float(number))
    run.reduction.take(Ended(rank=1, life="a1", state="lost", ended_ns=0))
    for step in range(50, 500):
        run.log(0, step, x=5.0)
    for step in range(50, 60):
        run.log(1, step, x=99.0)
    assert {run.points["x"][step] for step in range(50, 500)} == {5.0}
    assert run.points["ranks/x/mean"][55] == 5.0
    assert run.reduction.late == 10
    assert [run.points["rank/1/x"][step] for step in range(50, 60)] == [99.0] * 10


def test_memory_of_what_is_written_is_bounded_also_with_thousands_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "NAMES_KEPT", 15_000)
    run = Reduced()
    names = {f"n{number}": 1.0 for number in range(5000)}
    for step in range(5):
        for number in range(2):
            run.send(number, (SCALARS, step, 1, USER, names))
    assert len(run.reduction._aggregator._written._steps) == 3
    run.send(1, (SCALARS, 0, 1, USER, names))
    assert all(value == 1.0 for value in run.points["n4999"].values())
    assert run.reduction._aggregator._values == 0


def test_a_step_that_waits_is_not_forgotten_however_many_are_written_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a rank that counts something of its own while its loop runs a thousand steps a second."""
    monkeypatch.setattr(written, "STEPS_KEPT", 1)
    run = Reduced()
    run.log(0, 1, b=0.0)
    run.log(1, 2, b=1.0)
    run.log(1, 0, b=2.0)
    run.wait(3)
    run.log(0, 2, b=3.0)
    run.log(1, 0, b=4.0)
    assert (run.reduction.repeated, run.reduction.late) == (1, 0)
    run.log(0, 0, b=6.0)
    assert run.points["b"] == {0: 4.0, 1: 0.0, 2: 2.0}
    assert (run.points["rank/1/b"], run.points["rank/0/b"]) == ({0: 2.0, 2: 1.0}, {0: 6.0, 1: 0.0, 2: 3.0})


def test_steps_of_their_own_are_reduced_over_all_ranks_however_far_the_training_is() -> None:
    """Values of an epoch, logged at the epoch's number: every rank has left that step behind long ago."""
    run = Reduced()
    for epoch in range(3):
        for step in range(epoch * 100, epoch * 100 + 100):
            for number in range(2):
                run.log(number, step, loss=1.0)
        run.log(0, epoch, epoch_loss=1.0)
        run.wait(PATIENCE_S / 2)
        run.log(1, epoch, epoch_loss=3.0)
    assert run.points["epoch_loss"] == {0: 2.0, 1: 2.0, 2: 2.0}
    assert run.reduction.late == 0


def test_a_slow_evaluation_is_reduced_over_all_ranks_though_its_step_was_written() -> None:
    run = Reduced()
    for number in range(2):
        run.log(number, 7, loss=1.0)
    run.wait(2 * DEADLINE_S)
    run.log(0, 7, eval_loss=1.0)
    run.wait(PATIENCE_S + 5)  # rank 1 has said nothing yet of later steps, and the name is new
    assert "eval_loss" not in run.points
    run.log(1, 7, eval_loss=2.0)
    assert run.points["eval_loss"] == {7: 1.5}


# When it is written.


def test_what_one_rank_alone_logs_is_written_within_seconds() -> None:
    run = Reduced()
    logged: dict[int, float] = {}
    for step in range(60):
        logged[step] = run.now
        run.log(0, step, loss=1.0)
        run.wait(0.5)
    run.wait(3)
    assert max(run.at["loss", step] - logged[step] for step in range(60)) <= PATIENCE_S + 1.5
    assert set(run.points) == {"loss"}


def test_a_rank_that_is_known_to_log_a_name_is_waited_for() -> None:
    run = Reduced()
    for number in range(2):
        run.log(number, 0, x=1.0)
    run.log(0, 1, x=1.0)
    run.wait(5 * PATIENCE_S)
    assert 1 not in run.points["x"]
    run.log(1, 1, x=3.0)
    assert run.points["x"][1] == 2.0


def test_a_rank_that_does_not_log_a_name_any_more_costs_one_deadline() -> None:
    run = Reduced()
    for number in range(2):
        run.log(number, 0, x=1.0)
    for step in range(1, 40):
        run.log(0, step, x=1.0)
        run.wait(1)
    run.log(0, 40, x=1.0)
    run.wait(PATIENCE_S + 1)
    assert run.points["x"][40] == 1.0
    run.log(1, 41, x=3.0)  # it does again, and is waited for again
    run.log(0, 41, x=1.0)
    run.log(0, 42, x=1.0)
    run.wait(3 * PATIENCE_S)
    assert run.points["x"][41] == 2.0
    assert 42 not in run.points["x"]


# Clocks.


def test_time_passes_whatever_the_clocks_say() -> None:
    clock = Clock()
    began = clock.read(int(TODAY * S))
    assert clock.read(int((TODAY + 1) * S)) == began + 1
    assert clock.read(int((TODAY - 3600) * S)) == began + 1, "set back"
    assert clock.read(int((TODAY - 3599) * S)) == began + 2, "and goes on from there"
    assert clock.read(int((TODAY + 80 * 365 * 86400) * S)) == began + 2 + LEAP_S, "far ahead"
    assert clock.read(int((TODAY - 3598) * S)) == began + 2 + LEAP_S, "for one entry only"
    assert clock.read(int((TODAY - 3597) * S)) == began + 3 + LEAP_S


@pytest.mark.parametrize("jump", [-3600.0, 3600.0, 80 * 365 * 86400.0])
@pytest.mark.parametrize("back", [False, True])
def test_a_clock_that_jumps_holds_nothing_up_and_hurries_nothing(jump: float, back: bool) -> None:
    run = Reduced()
    for step in range(2):
        for number in range(2):
            run.log(number, step, x=1.0)
    run.now += jump
    run.log(0, 2, x=1.0)
    if back:
        run.now -= jump
    for step in range(2, 10):
        run.log(1, step, x=3.0)
        run.wait(1)
        if step > 2:
            run.log(0, step, x=1.0)
    assert run.points["x"] == {0: 1.0, 1: 1.0} | dict.fromkeys(range(2, 10), 2.0)
    run.log(0, 10, alone=1.0)
    run.log(0, 12, alone=1.0)
    run.wait(PATIENCE_S + 1)
    assert 10 in run.points["alone"]
    assert run.reduction.late == 0


# A world that changes.


@settings(deadline=None, print_blob=True, max_examples=60)
@given(
    worlds=st.lists(st.integers(1, 5), min_size=1, max_size=5), checkpoint=st.integers(0, 2), ahead=st.integers(0, 4)
)
def test_each_step_is_reduced_over_the_ranks_of_its_world_and_waits_for_no_other(
    worlds: list[int], checkpoint: int, ahead: int
) -> None:
    """An elastic job grows and shrinks; each time it is started again it may run its last steps again.

    There the ranks that were there before come first: one that comes before all of them is late at such a step.
    """
    ahead = 0 if checkpoint else ahead
    run = Reduced(world=0)
    expected: dict[int, tuple[int, float]] = {}
    for life, size in enumerate(worlds):
        begin = max(expected, default=-1) + 1 - (checkpoint if life else 0)
        for number in range(size):
            run.arrive(number, f"{life}/{number}", size)
        for step in range(begin, begin + 4):
            for number in (*range(ahead, size), *range(min(ahead, size))):
                run.send(number, (SCALARS, step, 1, USER, {"x": float(100 * step + number)}), life=f"{life}/{number}")
            expected[step] = size, 100 * step + (size - 1) / 2
            assert {step: run.points["x"][step] for step in expected} == {
                step: value for step, (_, value) in expected.items()
            }
            assert not run.reduction.waiting
            if size > 1:
                assert run.points["ranks/x/argmax"][step] == size - 1
                assert run.points["ranks/x/min"][step] == 100 * step
    assert (run.reduction.late, run.reduction.repeated, run.told) == (0, 0, [])
    assert run.reduction.rewound == (checkpoint > 0 and len(worlds) > 1)


# A training that goes back.


def test_a_loop_that_rolls_back_to_its_checkpoint_replaces_what_it_runs_again() -> None:
    run = Reduced()
    for step in range(31):
        for number in range(2):
            run.log(number, step, loss=100.0)
    for step in range(21, 41):
        for number in range(2):
            run.log(number, step, loss=200.0 + 2 * number)
    assert run.points["loss"] == dict.fromkeys(range(21), 100.0) | dict.fromkeys(range(21, 41), 201.0)
    assert (run.reduction.late, run.reduction.repeated, run.told) == (0, 0, [])
    assert run.reduction.rewound


def test_a_new_life_may_go_back_too_to_any_step_but_its_first() -> None:
    run = Reduced(world=1)
    for step in range(15):
        run.log(0, step, x=1.0)
    run.arrive(0, "b0", 1)
    for step, value in ((10, 2.0), (11, 2.0), (12, 2.0), (11, 3.0), (12, 3.0), (13, 3.0)):
        run.send(0, (SCALARS, step, 1, USER, {"x": value}), life="b0")
    assert [run.points["x"][step] for step in range(9, 15)] == [1.0, 2.0, 3.0, 3.0, 3.0, 1.0]
    assert (run.reduction.repeated, run.reduction.late) == (0, 0)
    run.send(0, (SCALARS, 10, 1, USER, {"x": 4.0}), life="b0")
    assert (run.points["x"][10], run.reduction.repeated) == (2.0, 1)


def test_what_waits_is_seen_and_what_was_held_back_comes_at_the_end() -> None:
    run = Reduced()
    assert [run.reduction.waiting] == [False]
    run.log(0, 1, x=1.0)
    assert [run.reduction.waiting] == [True]
    run.log(1, 1, x=1.0)
    assert [run.reduction.waiting] == [False]
    run.take(0, [spans(step=[2]), spans(step=[3])])
    assert [run.reduction.waiting] == [True]
    run.take(1, [spans(step=[2]), spans(step=[3])])
    assert [run.reduction.waiting] == [False]
    run.take(0, [Completions(3, 1, "", "", 0, {"text": ["a"]})])
    assert [run.reduction.waiting] == [True]
    run.seq["a1"] += 1  # of which nothing came: what follows is held
    run.log(1, 9, y=5.0)
    assert "y" not in run.points
    run.reduction.flush()
    assert run.points["y"] == {9: 5.0}
    assert [table.rows for table in run.tables] == [[[3, 0, "a"]]]
    assert [run.reduction.waiting] == [False]


def test_a_trainer_that_is_resumed_in_its_process_says_so() -> None:
    run = Reduced(world=1)
    for step in range(1, 31):
        run.send(0, (PROGRESS, step, 40, None), (SCALARS, step, 1, RANK, {"step_time": 1.0}))
        if step % 10 == 0:
            run.send(0, (SCALARS, step, 1, 0, {"train/loss": 100.0}))
    run.send(0, (PROGRESS, 20, 40, None))
    for step in range(21, 41):
        run.send(0, (PROGRESS, step, 40, None), (SCALARS, step, 1, RANK, {"step_time": 2.0}))
        if step % 10 == 0:
            run.send(0, (SCALARS, step, 1, 0, {"train/loss": 200.0}))
    assert run.points["train/loss"] == {10: 100.0, 20: 100.0, 30: 200.0, 40: 200.0}
    assert run.points["rank/0/step_time"] == dict.fromkeys(range(1, 21), 1.0) | dict.fromkeys(range(21, 41), 2.0)
    assert run.reduction.repeated == 0


def test_a_loop_that_counts_its_steps_anew_keeps_the_first_values_and_says_so_once() -> None:
    run = Reduced()
    for epoch in range(3):
        for step in range(100):
            for number in range(2):
                run.log(number, step, loss=float(epoch))
    assert run.points["loss"] == dict.fromkeys(range(100), 0.0)
    assert (run.reduction.repeated, run.reduction.late, run.replaced) == (400, 0, 0)
    assert not run.reduction.rewound
    assert run.told == [
        f"{REPEATED}rank 0 has logged 'loss' at step 0 before. The first value stands, and the journal has all of "
        "them: let the steps count on, over epochs too."
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_of_two_values_at_one_step_the_first_stands(world: int) -> None:
    run = Reduced(world)
    for step in range(3):
        for number in range(world):
            run.log(number, step, x=1.0)
            run.log(number, step, x=9.0)
    assert run.points["x"] == dict.fromkeys(range(3), 1.0)
    assert run.reduction.repeated == 3 * world
    assert len(run.told) == 1


def test_a_trainer_s_epoch_that_stands_beside_everything_is_no_second_value() -> None:
    run = Reduced(world=1)
    run.log(0, 5, scope=0, loss=1.0, epoch=0.5)
    run.log(0, 5, scope=0, eval_loss=2.0, epoch=0.5)
    assert run.points == {"loss": {5: 1.0}, "epoch": {5: 0.5}, "eval_loss": {5: 2.0}}
    assert (run.reduction.repeated, run.told) == (0, [])


def test_evaluations_that_end_in_another_order_are_all_there() -> None:
    """Not logged before, so nothing has gone back."""
    run = Reduced(world=1)
    for step in range(200):
        run.log(0, step, loss=1.0)
    run.log(0, 150, eval_loss=1.0)
    run.log(0, 100, eval_loss=2.0)
    assert run.points["eval_loss"] == {150: 1.0, 100: 2.0}
    assert not run.reduction.rewound


def test_what_the_user_logs_and_what_is_measured_under_one_name_are_both_there() -> None:
    run = Reduced(world=1)
    for step in range(3):
        run.log(0, step, scope=RANK, loss=1.0)
        run.log(0, step, loss=2.0)
    assert run.points == {"rank/0/loss": dict.fromkeys(range(3), 1.0), "loss": dict.fromkeys(range(3), 2.0)}


# Odd events.


SPANNED: dict[str, Any] = {
    "thread": [0],
    "name": [0],
    "step": [1],
    "begins": [0],
    "durations": [5],
    "parents": [],
    "gpu": [],
}


def spans(**columns: Any) -> Spans:
    return Spans(0, 0, 0, ["forward"], ["main"], **(SPANNED | columns))


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (Config({"raises": 1}), "An event (Config) of rank 0 is not in SwanLab: RuntimeError: SwanLab does not like"),
        (
            Progress(-5, 0),
            "An event (Progress) of rank 0 is not in SwanLab: ValueError: step -5 is not from 0 to 2**63 - 1.",
        ),
        (
            Scalars(0, 0, USER, {"y": None}),  # type: ignore[dict-item]
            "What was logged as 'y' of rank 0 is not in SwanLab: TypeError: ",
        ),
    ],
)
def test_an_odd_event_costs_no_other(odd: Event, told: str) -> None:
    """Of a client of another version, say."""
    run = Reduced(world=1)
    for step in range(2):
        run.take(0, [Scalars(step, 0, USER, {"x": 1.0}), odd, Scalars(step, 0, USER, {"z": 1.0}), Config({"a": 1})])
    assert run.points["x"] == run.points["z"] == {0: 1.0, 1: 1.0}
    assert run.configs == [{"a": 1}] * 2
    assert run.reduction.refused == 2
    assert len(run.told) == 1
    assert run.told[0].startswith(told)


def test_spans_of_steps_that_are_run_again_replace_those_before() -> None:
    run = Reduced(world=1)
    for begin, steps, duration in ((0, range(1, 6), 10**6), (10**9, range(3, 7), 10**8)):
        for step in steps:
            run.take(0, [Scalars(step, 1, USER, {"x": 1.0}), spans(step=[step], begins=[begin], durations=[duration])])
            begin += 10**8
    run.reduction.flush()
    expected = dict.fromkeys((1, 2), 0.001) | dict.fromkeys((3, 4, 5, 6), 0.1)
    assert run.points["profiling/forward"] == pytest.approx(expected)
    assert (run.reduction.repeated, run.reduction.late) == (0, 0)


def test_a_span_of_a_step_that_cannot_be_costs_no_other() -> None:
    run = Reduced(world=1)
    odd = spans(thread=[0] * 3, name=[0] * 3, step=[1, 2**63, 2], begins=[0, 1, 2], durations=[1] * 3)
    run.take(0, [odd])
    run.reduction.flush()
    assert set(run.points["profiling/forward"]) == {1, 2}
    assert run.reduction.timings.dropped == 1


def test_a_failing_output_is_not_taken_for_an_odd_event() -> None:
    """An upload that is interrupted must stop there."""
    run = Reduced(world=1)

    def fails(*row: Any) -> None:
        raise ConnectionError("gone")

    run.reduction._output = type("Output", (), {"write": fails, "config": fails})()
    with pytest.raises(ConnectionError):
        run.log(0, 0, x=1.0)


# Everything at once.

STEP = st.integers(0, 6)
LOG = st.tuples(st.integers(0, 2), STEP, st.sets(st.sampled_from(["a", "b", "c"]), min_size=1))
ENTRY = st.one_of(
    LOG,
    LOG,
    st.tuples(st.just("clock"), st.sampled_from([0.1, 1.0, 3.0, 40.0, -100.0, 1e9, -1e9])),
    st.tuples(st.just("progress"), st.integers(0, 2), STEP),
    st.tuples(st.sampled_from(["ended", "again"]), st.integers(0, 2)),
    st.just(("ticks",)),
)


@settings(deadline=None, print_blob=True, max_examples=300)
@given(st.lists(ENTRY, max_size=40), st.sampled_from([1, 3, 10_000]), st.integers(1, 3))
@example([(0, 1, {"b"}), (1, 2, {"b"}), (1, 0, {"b"}), ("ticks",), (0, 2, {"b"}), (1, 0, {"b"})], 1, 2)
def test_every_value_is_written_once_or_counted(entries: list[Any], kept: int, world: int) -> None:
    """Late, logged again, replaced while it waited, or in SwanLab: one of these, whatever comes in whatever order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(written, "STEPS_KEPT", kept)

        def reduced() -> tuple[Reduced, int]:
            run, logged, lives = Reduced(world), 0, dict.fromkeys(range(world), 0)
            for entry in entries:
                rank = entry[1] % world if isinstance(entry[0], str) and len(entry) > 1 and entry[0] != "clock" else 0
                life = f"a{rank}" + "+" * lives[rank]
                match entry:
                    case (int() as rank, step, names):
                        rank %= world
                        values = {name: float(logged + number) for number, name in enumerate(sorted(names))}
                        logged += len(values)
                        run.send(rank, (SCALARS, step, 1, USER, values), life=f"a{rank}" + "+" * lives[rank])
                    case ("clock", jump):
                        run.now = max(0.0, run.now + jump)
                    case ("progress", rank, step):
                        run.send(
                            rank % world, (PROGRESS, step, 0, None), life=f"a{rank % world}" + "+" * lives[rank % world]
                        )
                    case ("ended", rank):
                        life = f"a{rank % world}" + "+" * lives[rank % world]
                        run.reduction.take(Ended(rank=rank % world, life=life, state="lost", ended_ns=0))
                    case ("again", rank):
                        lives[rank % world] += 1
                        run.arrive(rank % world, f"a{rank % world}" + "+" * lives[rank % world], world)
                    case _:
                        run.wait(3)
            run.reduction.flush()
            return run, logged

        run, logged = reduced()
        aggregator = run.reduction._aggregator
        assert set(run.own.values()) <= {1}
        assert logged == len(run.own) + aggregator.repeated + aggregator.replaced
        assert aggregator._values == 0
        assert not aggregator._rows
        assert reduced()[0].points == run.points, "the same entries, other rows"
        for name in "abc":
            for step, value in run.points.get(f"ranks/{name}/mean", {}).items():
                assert math.isfinite(value), (name, step)
