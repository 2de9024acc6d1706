"""Whatever fails by chance says how it is run again: a line of the log is copied, and it fails in the same way."""

from __future__ import annotations

import re

import pytest

FAILING = """
    import random
    import pytest
    from hypothesis import reproduce_failure, given, strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, rule

    REPRODUCE
    @given(st.integers(0, 10**9))
    def test_of_a_property(number):
        assert number % 7 != 3

    class Machine(RuleBasedStateMachine):
        @rule(number=st.integers(1000, 10**9))
        def look(self, number):
            assert number % 3

    TestMachine = Machine.TestCase

    @pytest.mark.parametrize("seed", [3, 4])
    def test_of_a_seed(seed):
        assert random.Random(seed).random() > 0.237
"""


def failures(pytester: pytest.Pytester, *selected: str, reproduce: str = "") -> str:
    """What a run of them prints, with the hooks and the profile of the tests here."""
    path = pytester.makepyfile(test_by_chance=FAILING.replace("REPRODUCE", reproduce))
    names = [f"{path.name}::{name}" for name in selected] or [path.name]
    done = pytester.runpytest_inprocess("-p", "tests.conftest", "-p", "no:cacheprovider", "-p", "no:xdist", *names)
    assert done.ret == 1, done.stdout.str()
    return done.stdout.str()


def test_a_failing_property_is_run_again_by_its_line(pytester: pytest.Pytester) -> None:
    said = failures(pytester, "test_of_a_property")
    again = re.findall(r"^again, on top of the test: (@reproduce_failure\(.*\))$", said, re.M)
    assert len(again) == 1
    (example,) = set(re.findall(r"number=\d+", said))
    repeated = failures(pytester, "test_of_a_property", reproduce=again[0])
    assert {example} == set(re.findall(r"number=\d+", repeated))


def test_a_failing_history_and_a_failing_seed_are_told(pytester: pytest.Pytester) -> None:
    said = failures(pytester)
    assert len(re.findall(r"^again, on top of the test: @reproduce_failure\(.*\)$", said, re.M)) == 2
    assert "again: python -m pytest 'test_by_chance.py::test_of_a_seed[4]'" in said
    assert "again: python -m pytest test_by_chance.py::TestMachine::runTest" in said
