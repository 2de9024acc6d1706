"""Whatever a training logs: it never raises, and one bad value never costs another."""

from __future__ import annotations

import dataclasses
import decimal
import enum
import fractions
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.events import Completions, Scalars
from swanlab_ray.observer.cli import main
from swanlab_ray.observer.history import archive
from swanlab_ray.observer.job.identity import Identity
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.unobserved import DisabledObserver
from tests.conftest import wait_until
from tests.incarnations import Cluster, Link, mortal, rank, settings_for
from tests.shaky_link import ShakyLink


class Hostile:
    """Raises whatever is done with it."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("__class__", "_repr_pretty_"):  # hypothesis asks for them
            return object.__getattribute__(self, name)
        raise RuntimeError(name)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text("Hostile()")

    def __repr__(self) -> str:
        raise RuntimeError("repr")

    def __str__(self) -> str:
        raise RuntimeError("str")


class Unbound(Hostile):
    """A proxy of nothing, as web frameworks have them: it does not even tell its class."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


class HostileMapping(Mapping[str, float]):
    def __getitem__(self, key: str) -> float:
        raise RuntimeError("getitem")

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("iter")

    def __len__(self) -> int:
        return 1


@dataclasses.dataclass(frozen=True)
class Record:
    """Written as a map, and so as names within its own."""

    name: str = "x"


class Level(enum.IntEnum):
    HIGH = 3


ODD: tuple[Any, ...] = (
    None, "text", b"bytes", 1j, object(), int, [1.0], (1, 2), {1}, Hostile(), HostileMapping(), Record(), lambda: 1,
    10**400, -(2**63) - 1, math.nan, math.inf, True, Level.HIGH, decimal.Decimal("NaN"), fractions.Fraction(1, 3),
    np.array([1.0, 2.0]), np.array([0.5]), np.array("text"), np.ma.masked, np.float16(1), np.datetime64("2026-01-01"),
    torch.tensor([1.0, 2.0]), torch.tensor([1.5]), torch.tensor(1.0, device="meta"), torch.tensor(1j), range(3),
)  # fmt: skip
NAMES = st.one_of(
    st.text(),
    st.sampled_from([None, 1, 2.5, True, ("a", 1), b"b", Level.HIGH, "\ud800", "", "x" * 5000, frozenset({1})]),
)
VALUES = st.recursive(
    st.one_of(st.sampled_from(ODD), st.floats(), st.integers()),
    lambda children: st.one_of(st.dictionaries(NAMES, children, max_size=3), st.lists(children, max_size=2)),
    max_leaves=8,
)
STEPS = st.one_of(
    st.none(), st.integers(0, 2**65), st.integers(), st.sampled_from(["7", 1.5, Hostile(), [], np.int64(4), True])
)


def arrived(link: ShakyLink) -> dict[str, float]:
    return {name: value for event in link.taken if isinstance(event, Scalars) for name, value in event.values.items()}


def test_any_value_under_any_name_at_any_step_leaves_the_others_alone(link: ShakyLink, observer: Observer) -> None:
    """Beside each odd value a good one is logged; it arrives wherever the step is one."""
    good: list[str] = []

    @hypothesis_settings(max_examples=300, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
    @given(data=st.dictionaries(NAMES, VALUES, max_size=4), step=STEPS)
    def log(data: dict[Any, Any], step: Any) -> None:
        name = f"good/{len(good)}"
        observer.log({name: 1.0, **data, f"{name}/after": 2.0}, step)
        observer.log_rank(data, step)
        observer.log_completions([data, {"completion": name}], step)
        observer.step = step
        if step is None or (type(step) in (int, bool, np.int64) and 0 <= step < 1 << 63):
            good.append(name)

    log()
    observer.step = None
    assert observer.finish()
    values = arrived(link)
    assert [name for name in good if values.get(name) != 1.0 or values.get(f"{name}/after") != 2.0] == []
    rows = [row for event in link.taken if isinstance(event, Completions) for row in event.columns["completion"]]
    assert [name for name in good if name not in rows] == []


def test_mappings_that_contain_themselves_are_cut_where_they_do(
    link: ShakyLink, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    cyclic: dict[str, Any] = {"a": 1.0}
    cyclic["self"] = cyclic["again"] = {"inner": cyclic, "b": 2.0}
    observer.log(cyclic, 0)
    deep: dict[str, Any] = {"x": 1.0}
    for _ in range(5000):
        deep = {"d": deep}
    observer.log({"deep": deep, "y": 3.0}, 1)
    for level in (32, 250, 900, 990, 1500, 3000):  # in some of these an interpreter's limit lies
        deep = {"x": 1.0}
        for _ in range(level):
            deep = {"d": deep}
        observer.log({"deep": deep, f"beside/{level}": 4.0}, 1)
    assert observer.finish()
    beside = {f"beside/{level}": 4.0 for level in (32, 250, 900, 990, 1500, 3000)}
    got = {name: value for name, value in arrived(link).items() if not name.startswith("deep/")}
    assert got == {"a": 1.0, "self/b": 2.0, "again/b": 2.0, "y": 3.0} | beside
    assert "'self/inner' is not logged: it contains itself" in caplog.text


def test_a_dict_that_another_thread_changes_is_logged(link: ShakyLink, observer: Observer) -> None:
    class Changing(dict[str, Any]):
        """Changes whenever somebody goes through it, the first three times."""

        looks = 0

        def items(self) -> Any:
            self.looks += 1
            if self.looks <= 3:
                raise RuntimeError("dictionary changed size during iteration")
            return super().items()

    observer.log({"x": 1.0, "nested": Changing(a=1, bad=None)}, 0)
    assert observer.finish()
    assert arrived(link) == {"x": 1.0, "nested/a": 1.0}


def test_numbers_of_every_kind_are_taken(link: ShakyLink, observer: Observer) -> None:
    numbers: dict[str, tuple[Any, float]] = {
        "np32": (np.float32(1.5), 1.5), "np16": (np.float16(1.5), 1.5), "npi8": (np.int8(-3), -3.0),
        "npu64": (np.uint64(2**64 - 1), 2.0**64), "npbool": (np.bool_(True), 1.0),
        "longdouble": (np.longdouble(1.5), 1.5),
        "zero_d": (np.array(0.25), 0.25), "one": (np.array([0.75]), 0.75), "one_by_one": (np.array([[0.5]]), 0.5),
        "bf16": (torch.tensor(1.5, dtype=torch.bfloat16), 1.5), "fp8": (torch.tensor(1.5).to(torch.float8_e4m3fn), 1.5),
        "tensor_one": (torch.tensor([[2.5]]), 2.5), "grad": (torch.tensor(1.5, requires_grad=True), 1.5),
        "parameter": (torch.nn.Parameter(torch.tensor(2.5)), 2.5), "booltensor": (torch.tensor(True), 1.0),
        "decimal": (decimal.Decimal("1.25"), 1.25), "fraction": (fractions.Fraction(1, 4), 0.25),
        "enum": (Level.HIGH, 3.0),
        "big": (2**63, 2.0**63), "huge": (10**30, 1e30), "negative": (-(2**63) - 1, -(2.0**63)), "bool": (True, 1.0),
    }  # fmt: skip
    for name, (number, _) in numbers.items():
        observer.log({name: number}, 0)
    assert observer.finish()
    assert arrived(link) == {name: value for name, (_, value) in numbers.items()}
    assert link.goodbyes[0].counts.refused == 0


def test_every_wrong_name_is_told_and_all_of_them_are_counted(
    link: ShakyLink, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(3):
        observer.log({"x": 1.0, "one": 1j, "two": object()}, step)
    observer.log({"x": 1.0}, 2**70)
    observer.log({"x": 1.0}, -1)
    observer.log({"x": 1.0}, "7")  # type: ignore[arg-type]
    observer.log([("x", 1.0)], 3)  # type: ignore[arg-type]
    assert observer.finish()
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert said == [
        "'one' is not logged: complex is not a number; log numbers.",
        "'two' is not logged: object is not a number; log numbers.",
        "A step has 71 bits, 63 are the most: pass a smaller one.",
        "step -1 is negative: pass an int of 0 or more, or leave it out.",
        "step '7' is not a whole number: pass an int of 0 or more, or leave it out.",
        "log() takes a dict of names and numbers, not list.",
    ]
    assert link.goodbyes[0].counts.refused == 3 * 2 + 4


def test_so_many_wrong_names_hide_nothing_else(
    link: ShakyLink, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(1_200):
        observer.log({f"x{step}": object()}, step)
    assert observer.finish()
    observer.log({"x": 1.0}, 1_200)
    assert "'x0' is not logged" in caplog.text
    assert "Something was logged after finish()" in caplog.text
    assert link.goodbyes[0].counts.refused == 1_200


class Placement:
    def __init__(self, replicated: bool) -> None:
        self.replicated = replicated

    def is_replicate(self) -> bool:
        return self.replicated

    def __str__(self) -> str:
        return "R" if self.replicated else "P(sum)"


class DTensor:
    """As torch's: what ``float()`` gives is this rank's part."""

    def __init__(self, replicated: bool, ranks: int = 2) -> None:
        self.placements = (Placement(replicated),)
        self.device_mesh = torch.zeros(ranks)
        self.device_mesh.size = lambda: ranks

    def to_local(self) -> torch.Tensor:
        return torch.tensor(1.5)

    def __float__(self) -> float:
        return 1.5


def test_a_part_of_a_tensor_is_not_logged_as_if_it_were_the_whole(
    link: ShakyLink, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    observer.log({"whole": DTensor(True), "alone": DTensor(False, 1), "part": DTensor(False), "x": 1.0}, 0)
    assert observer.finish()
    assert arrived(link) == {"whole": 1.5, "alone": 1.5, "x": 1.0}
    assert (
        "'part' is not logged: it is only this rank's part of a DTensor (P(sum)); log its full_tensor()." in caplog.text
    )


def test_nor_is_a_part_of_a_tensor_in_a_row(
    link: ShakyLink, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    observer.log_completions([{"whole": DTensor(True), "part": DTensor(False), "x": 1.0}], 0)
    assert observer.finish()
    (rows,) = [event for event in link.taken if isinstance(event, Completions)]
    assert rows.columns == {"whole": [1.5], "part": [None], "x": [1.0]}
    assert "'part' is not logged: it is only this rank's part of a DTensor (P(sum))" in caplog.text


ODD_CALLS: list[Callable[[Any], object]] = [
    lambda observer: observer.log(Hostile(), Hostile()),
    lambda observer: observer.log(Unbound(), Unbound()),
    lambda observer: observer.log({"x": Unbound(), Unbound(): 1.0}, 0),
    lambda observer: observer.log_completions([{"x": Unbound(), Unbound(): 1.0}, Unbound()]),
    lambda observer: observer.config(x=Unbound()),
    lambda observer: observer.log_completions(Hostile()),
    lambda observer: observer.log_completions(iter([{"completion": "a"}, 3, HostileMapping()])),
    lambda observer: observer.config(Hostile()),
    lambda observer: observer.config({"x": Hostile()}),
    lambda observer: observer.progress(2**70, Hostile()),
    lambda observer: observer.set_result("exploded", Hostile()),
    lambda observer: observer.flush(timeout="soon"),
    lambda observer: setattr(observer, "step", Hostile()),
    lambda observer: observer.span(Hostile()).__enter__(),
]


@pytest.mark.parametrize("call", ODD_CALLS)
def test_no_call_raises_and_the_run_goes_on(call: Callable[[Any], object], link: ShakyLink, observer: Observer) -> None:
    call(observer)
    observer.log({"after": 1.0}, 0)
    assert observer.finish()
    assert arrived(link) == {"after": 1.0}


@pytest.mark.parametrize("call", ODD_CALLS)
def test_no_call_of_an_observer_that_observes_nothing_raises(call: Callable[[Any], object]) -> None:
    call(DisabledObserver(ObserverSettings(mode="disabled"), Identity(0, 1, 0, 1)))


def test_a_number_beyond_floats_is_too_large(
    link: ShakyLink, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    observer.log({"x": 1.0, "big": 10**400, "fraction": fractions.Fraction(-(10**400)), "beyond_64_bits": 10**30}, 0)
    assert observer.finish()
    assert arrived(link) == {"x": 1.0, "beyond_64_bits": 1e30}
    assert "'big' is not logged: int is too large; log numbers below" in caplog.text
    assert "'fraction' is not logged: Fraction is too large" in caplog.text


def test_what_is_masked_is_no_number(link: ShakyLink, observer: Observer, caplog: pytest.LogCaptureFixture) -> None:
    observer.log(
        {"constant": np.ma.masked, "array": np.ma.array(3.0, mask=True), "shown": np.ma.array(3.0, mask=False)}, 0
    )
    assert observer.finish()
    assert arrived(link) == {"shown": 3.0}
    assert "'constant' is not logged: MaskedConstant is masked; log numbers." in caplog.text


def test_a_text_under_the_name_of_a_secret_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path))
    observer = rank(cluster, Link(cluster))
    observer.log({"pwd": "zqXy185Kd8sPq2LmZ", "note": "hello", "x": 1.0}, 0)
    assert observer.finish()
    assert "'pwd' is not logged: str *** is not a number" in caplog.text
    assert "'note' is not logged: str 'hello' is not a number" in caplog.text
    assert "zqXy185Kd8sPq2LmZ" not in caplog.text


def test_strict_raises_where_others_are_warned(link: ShakyLink, tmp_path: Path) -> None:
    settings = ObserverSettings(project="p", mode="offline", log_dir=tmp_path, strict=True)
    observer = Observer(settings, Identity(0, 1, 0, 1), link)
    with pytest.raises(ValueError, match="'x' is not logged: complex is not a number"):
        observer.log({"x": 1j}, 0)
    with pytest.raises(ValueError, match="63 are the most"):
        observer.log({"x": 1.0}, 2**64)
    with pytest.raises(ValueError, match="state 'failed' is none of success, crashed, aborted"):
        observer.finish("failed")  # type: ignore[arg-type]
    assert observer.finish()


def test_an_end_in_words_of_one_s_own_is_a_crash_with_its_error(link: ShakyLink, observer: Observer) -> None:
    observer.finish("failed", ValueError("no data"))  # type: ignore[arg-type]
    assert (link.goodbyes[0].state, link.goodbyes[0].error) == ("crashed", "no data")


def test_an_error_of_any_length_ends_a_run_in_time(link: ShakyLink, observer: Observer) -> None:
    observer.finish("crashed", "a=b " * 1_000_000)
    assert 1_000 < len(link.goodbyes[0].error or "") <= 65_536


def test_what_comes_after_the_end_is_told_once_and_counted(
    link: ShakyLink, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    observer.log({"x": 1.0}, 0)
    assert observer.finish()
    observer.log({"test/accuracy": 0.9}, 100)
    observer.log({"x": 1.0, "wrong": None}, 101)
    observer.config(best=0.9)
    observer.log_completions([{"completion": "x"}], 100)
    with observer.span("s"):
        pass
    assert observer.flush(timeout=0.1)
    statistics = observer.statistics()
    assert (statistics.logged, statistics.acknowledged) == (5, 1)
    assert statistics.dropped == {"logged after finish()": 4}
    assert caplog.text.count("logged after finish()") == 1
    wait_until(lambda: arrived(link) == {"x": 1.0})


def test_what_was_refused_stands_in_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path))
    first, second = (rank(cluster, Link(cluster), number, 2) for number in range(2))
    first.log({"x": 1.0, "bad": 1j}, 0)
    second.log({"x": 1.0}, -1)
    second.log({"x": 1.0}, 0)
    assert first.finish()
    assert second.finish()
    assert second.outcome is not None
    assert second.outcome.rejected == 2
    run = archive.load_run(cluster.files)
    assert [account.refused for account in run.accounts] == [1, 1]
    assert any(line.startswith("  refused: 2 values or calls") for line in archive.describe(run, {}))


@pytest.mark.parametrize("whose", ["rank", "writer"])
def test_every_wrong_value_is_counted_whoever_finds_it(
    whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What msgspec encodes, such as text, None and a list, is found by who decodes it; with 1j the rank finds all."""
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path))
    observer = rank(cluster, Link(cluster))
    wrong = {"text": "text", "none": None, "list": [1, 2], "nested": {"b": b"x"}}
    for step in range(10):
        observer.log({"x": 1.0} | wrong | ({"complex": 1j} if whose == "rank" else {}), step)
    assert observer.finish()
    refused = 10 * len(wrong) + (10 if whose == "rank" else 0)
    assert observer.outcome is not None
    assert observer.outcome.rejected == refused

    def invoke(*arguments: str) -> str:
        done = CliRunner().invoke(main, [*arguments, "--log-dir", str(tmp_path)], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    assert f"  refused: {refused} values or calls" in invoke("show")
    (shown,) = json.loads(invoke("show", "--json"))["ranks"]
    assert shown["refused"] == refused
    (listed,) = json.loads(invoke("runs", "--json"))[0]["ranks"]
    assert listed.keys() == shown.keys() - {"refused"}  # nobody has looked into the batches
