"""Who is waited for, and why: from the times of each rank's phases."""

from __future__ import annotations

import random

import pytest

from swanlab_ray.actors.health.stragglers import ELSEWHERE, Lateness, Straggler, Stragglers
from swanlab_ray.actors.reduction.spans import Phase, StepTimes

Work = dict[str, float]


def steps_of(works: list[list[Work]], meet: str | None = "backward", noise: float = 0.0) -> list[dict[int, StepTimes]]:
    """Ranks that do this work in each step, and wait for the last of them at the end of one phase.

    Args:
        works: by step and rank, seconds of work by phase; ``other`` is outside of all spans, before what follows it.
        meet: the phase with the collective.
        noise: seconds by which each phase varies.
    """
    chance = random.Random(0)
    clocks = [0.0] * len(works[0])
    steps = []
    for number, step in enumerate(works):
        ranks = {rank: StepTimes(number, 0, {}, {}) for rank in range(len(step))}
        for phase in step[0]:
            if phase == ELSEWHERE:
                continue
            ends = []
            for rank, work in enumerate(step):
                names = list(work)
                at = names.index(phase)
                before = work[ELSEWHERE] if at and names[at - 1] == ELSEWHERE else 0.0
                own = work[phase] + chance.random() * noise
                ranks[rank].phases[phase] = Phase(own, before)
                clocks[rank] += own + before
                ends.append(clocks[rank])
            if phase == meet:
                for rank, times in ranks.items():
                    times.phases[phase].own += max(ends) - clocks[rank]
                clocks = [max(ends)] * len(clocks)
        steps.append(ranks)
    return steps


def seen(steps: list[dict[int, StepTimes]]) -> Straggler | None:
    stragglers = Stragglers()
    stragglers.set_ranks(set(steps[0]), 0)
    for ranks in steps:
        for rank, times in ranks.items():
            stragglers.add(rank, times)
    return stragglers.current


USUAL: Work = {"data": 0.02, "forward": 0.1, "backward": 0.2, "optimizer": 0.05}


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("phase", ["data", "forward", "optimizer", ELSEWHERE])
def test_the_slow_rank_is_named_and_not_those_that_wait_for_it(phase: str, ranks: int) -> None:
    """Rank 1 loses 0.3 s in a phase; the others lose them in backward, in which they wait for it."""
    slow = {"data": 0.0, ELSEWHERE: 0.0} | USUAL
    slow[phase] += 0.3
    works = [[slow if rank == 1 else USUAL for rank in range(ranks)]] * 10
    found = seen(steps_of(works, noise=0.005))
    assert found is not None
    assert (found.rank, found.phase) == (1, phase)
    assert found.score == pytest.approx(0.3 / 0.67, abs=0.06)


def test_slow_in_the_phase_in_which_they_meet() -> None:
    """Then nobody comes late to it; the time of the collective itself is everybody's."""
    works = [[USUAL | {"backward": 0.5}, USUAL]] * 5
    assert seen(steps_of(works, noise=0.001)) is None


def test_ranks_that_never_meet() -> None:
    found = seen(steps_of([[USUAL, USUAL, USUAL | {"forward": 0.4}]] * 10, meet=None))
    assert found is not None
    assert (found.rank, found.phase) == (2, "forward")


def test_equal_ranks_have_no_straggler() -> None:
    assert seen(steps_of([[USUAL] * 4] * 20, noise=0.01)) is None
    assert seen([{0: StepTimes(0, 0, {}, {}), 1: StepTimes(0, 0, {}, {})}]) is None


def test_a_rank_that_was_slow_once_is_forgotten() -> None:
    once = [USUAL, USUAL | {"data": 3.0}]
    assert seen(steps_of([once])) is not None
    assert seen(steps_of([once] + [[USUAL] * 2] * 30)) is None


def test_it_changes_with_the_steps() -> None:
    found = seen(steps_of([[USUAL | {"data": 0.5}, USUAL]] * 20 + [[USUAL, USUAL | {"forward": 0.5}]] * 20))
    assert found is not None
    assert (found.rank, found.phase) == (1, "forward")
    assert str(found) == f"rank 1, forward ({found.score:.0%} of the time is waiting for it)"


def test_what_a_rank_loses_after_they_met_shows_in_the_next_step() -> None:
    """A checkpoint of rank 0 at the end of a step: the others wait for it in the next one's backward."""
    with_checkpoint = [USUAL | {"checkpoint": 2.0}, USUAL | {"checkpoint": 0.0}]
    lateness = Lateness()
    first, second = (lateness.waits(ranks) for ranks in steps_of([with_checkpoint, [USUAL, USUAL]]))
    assert not first
    assert second.keys() == {(0, "checkpoint")}
    assert second[0, "checkpoint"] == pytest.approx(2.0)


def test_steps_wait_for_all_ranks_and_not_for_ever() -> None:
    stragglers = Stragglers()
    (ranks,) = steps_of([[USUAL | {"data": 1.0}, USUAL]])
    stragglers.set_ranks({0}, 1)
    assert stragglers.add(0, ranks[0]) is None
    stragglers.set_ranks({0, 1}, 0)
    found = stragglers.add(1, ranks[1])
    assert found is not None
    assert (found.rank, found.phase) == (0, "data")
    for step in range(1000):
        stragglers.add(0, StepTimes(step, 0, {}, ranks[0].phases))
    assert len(stragglers._steps) <= 200
