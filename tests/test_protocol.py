from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from swanlab_ray.actors.wire import codec
from swanlab_ray.actors.wire.codec import Undecodable, decode_batch, encode_batch
from swanlab_ray.actors.wire.events import (
    COMPLETIONS,
    CONFIG,
    OUTCOME,
    PROGRESS,
    SCALARS,
    SPANS,
    STACKS,
    TOKENIZER,
    USER,
    Scalars,
)
from swanlab_ray.observer.encoding.numbers import encode, salvage


def through(values: dict[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """What the writer gets of a ``log()`` call, and what it rejects."""
    event = encode((SCALARS, 3, time.time_ns(), USER, values))
    events, rejected = decode_batch(encode_batch([event]))
    merged: dict[str, float] = {}
    for one in events:
        assert isinstance(one, Scalars)
        merged.update(one.values)
    return merged, {bad.key: bad.reason for bad in rejected}


def test_numbers_of_every_kind_arrive_as_floats() -> None:
    values = {
        "int": 3,
        "float": 0.5,
        "bool": True,
        "np.float32": np.float32(0.25),
        "np.int64": np.int64(7),
        "np.bool": np.bool_(True),
        "0-d array": np.array(2.5),
        "tensor": torch.tensor(1.5, requires_grad=True),
        "bf16": torch.tensor(0.5, dtype=torch.bfloat16),
        "int tensor": torch.tensor(4),
    }
    got, rejected = through(values)
    assert got == {name: pytest.approx(float(value)) for name, value in values.items()}
    assert not rejected


def test_nan_and_infinity_stay_in_the_record() -> None:
    got, _ = through({"nan": math.nan, "inf": math.inf, "t": torch.tensor(-math.inf)})
    assert math.isnan(got["nan"])
    assert (got["inf"], got["t"]) == (math.inf, -math.inf)


def test_nested_mappings_are_joined() -> None:
    assert through({"a": {"b": 1, "c": {"d": 2.5}}, "7": 1})[0] == {"a/b": 1.0, "a/c/d": 2.5, "7": 1.0}


def test_none_strings_and_lists_are_rejected_by_name_and_siblings_stay() -> None:
    got, rejected = through({"x": 1, "none": None, "text": "hi", "list": [1, 2], "in": {"side": None}})
    assert got == {"x": 1.0}
    assert rejected == {
        "none": "None is not a number",
        "text": "str 'hi' is not a number",
        "list": "list [1, 2] is not a number",
        "in/side": "None is not a number",
    }


def test_one_odd_event_does_not_cost_the_batch() -> None:
    good = encode((SCALARS, 1, 0, USER, {"x": 1.0}))
    odd = encode((SCALARS, 2, 0, USER, {"x": None, "y": {"z": 2}}))
    events, rejected = decode_batch(encode_batch([good, odd, good]))
    assert [(event.step, event.values) for event in events if isinstance(event, Scalars)] == [
        (1, {"x": 1.0}),
        (2, {"y/z": 2.0}),
        (1, {"x": 1.0}),
    ]
    assert [bad.key for bad in rejected] == ["x"]


GOOD = encode((SCALARS, 1, 0, USER, {"x": 1.0}))


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ((99, 1, {"what": "a later version says"}), "an event of kind int 99"),
        ((8, 1), "an event of kind int 8"),
        ((-1, 1), "an event of kind int -1"),
        ((True, 1), "an event of kind bool True"),
        ((CONFIG, 7), "config"),
        ((PROGRESS, "a"), "progress"),
        ((OUTCOME, "won", None, 1), "outcome"),
        ((TOKENIZER, 7), "tokenizer"),
        ((STACKS, 1, 1, "", None, ["main"], []), "stacks"),
        ((SCALARS, 1, 0), "an event"),
        ((SCALARS, -1, 0, USER, {"x": 1.0}), "scalars"),
        ((SCALARS, 2**63, 0, USER, {"x": 1.0}), "scalars"),
        ((SCALARS, 1, 0, USER, ["x", 1.0]), "scalars"),
        ((SPANS, 0, 0, 0, ["name"], ["main"], [0], [7], [0], [0], [0], [], []), "spans"),
        ((SPANS, 0, 0, 0, ["name"], ["main"], [0], [1], [0], [0], [0], [], []), "spans"),
        ((SPANS, 0, 0, 0, ["name"], ["main"], [-1], [0], [0], [0], [0], [], []), "spans"),
        ((SPANS, 0, 0, 0, ["name"], ["main"], [0], [0], [0], [0, 1], [0], [], []), "spans"),
        ((SPANS, 0, 0, 0, ["name"], ["main"], [0], [0], [0], [0], [0], [1, 2], []), "spans"),
        ((SPANS, 0, 0, 0, ["name"], ["main"], [0], [0], [0], [0], [0], [], [1, 2]), "spans"),
        ((COMPLETIONS, 1, 0, "", "", 0, {"prompt": ["a", "b"], "completion": ["c"]}), "completions"),
        (7, "an event"),
    ],
)
def test_an_event_that_this_version_does_not_understand_costs_itself_only(event: Any, kind: str) -> None:
    """As of a rank of another version: a kind, a field or a shape that nobody here knows."""
    events, rejected = decode_batch(encode_batch([GOOD, msgspec.msgpack.encode(event), GOOD]))
    assert [event.step for event in events if isinstance(event, Scalars)] == [1, 1]
    assert [(bad.key, bad.whole) for bad in rejected] == [(kind, True)]
    assert rejected[0].sentence.startswith(f"'{kind}' is not logged: ")
    assert rejected[0].sentence.endswith("; is the same version of swanlab-ray installed on all machines?")
    unknown = "this version of swanlab-ray does not know it"
    assert (rejected[0].reason == unknown) == kind.startswith("an event of kind")


def test_a_long_value_is_shown_by_its_beginning() -> None:
    _, rejected = through({"fits": "x" * 38, "does not": "x" * 39})
    assert rejected == {
        "fits": f"str '{'x' * 38}' is not a number",
        "does not": f"str '{'x' * 36}... is not a number",
    }


def test_a_batch_is_compressed_where_that_pays() -> None:
    small = encode((SCALARS, 1, 0, USER, {"x" * (codec.COMPRESS_BYTES - 30): 1.0}))
    assert not encode_batch([small]).startswith(zstandard.FRAME_HEADER)
    large = encode_batch([small] * 2)
    assert large.startswith(zstandard.FRAME_HEADER)
    assert len(large) < len(small)
    assert len(decode_batch(large)[0]) == 2


def test_a_name_that_is_no_text_costs_its_event_only() -> None:
    broken = GOOD.replace(b"\xa1x", b"\xa1\xff")
    events, rejected = decode_batch(encode_batch([GOOD, broken, GOOD]))
    assert (len(events), len(rejected)) == (2, 1)


def test_fields_that_a_later_version_has_added_are_passed_over() -> None:
    events, rejected = decode_batch(encode_batch([encode((SCALARS, 1, 0, USER, {"x": 1.0}, "new", 7))]))
    assert (events, rejected) == ([Scalars(1, 0, USER, {"x": 1.0})], [])
    events, rejected = decode_batch(encode_batch([encode((SCALARS, 1, 0, USER, {"x": {"y": 1}}, "new", 7))]))
    assert (events, rejected) == ([Scalars(1, 0, USER, {"x/y": 1.0})], [])


def test_what_unpacks_to_more_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it does not say how much that is; and nothing of it is unpacked."""
    monkeypatch.setattr(codec, "BATCH_LIMIT", 1000)
    huge = zstandard.ZstdCompressor().compress(bytes(1001))
    unstated = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10))
    monkeypatch.setattr(zstandard, "ZstdDecompressor", lambda: pytest.fail("it is unpacked"))
    for batch in (huge, unstated):
        with pytest.raises(Undecodable, match="unpacks to"):
            decode_batch(batch)


_nested = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=5),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers(0, 9), st.none()), inner, max_size=4),
    ),
    max_leaves=12,
)


@given(event=st.one_of(_nested, st.tuples(st.integers(0, 8), _nested, _nested, _nested, _nested)), deep=st.booleans())
@settings(deadline=None, max_examples=300, print_blob=True)
def test_whatever_an_event_is_those_beside_it_are_kept(event: Any, deep: bool) -> None:
    odd = b"\x91" * 300 + b"\x00" if deep else msgspec.msgpack.encode(event)
    events, _ = decode_batch(encode_batch([GOOD, odd, GOOD]))
    assert events.count(Scalars(1, 0, USER, {"x": 1.0})) >= 2


@given(batch=st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda end: zstandard.FRAME_HEADER + end)))
@settings(deadline=None, max_examples=300, print_blob=True)
def test_bytes_that_are_no_batch_are_undecodable_and_nothing_else(batch: bytes) -> None:
    with contextlib.suppress(Undecodable):
        decode_batch(batch)


def test_salvage_keeps_what_is_a_number() -> None:
    rejected: dict[str, str] = {}
    kept = salvage({"x": 1, "v": torch.ones(3), "o": object(), "n": {"y": 2}}, rejected.__setitem__)
    assert kept == {"x": 1.0, "n/y": 2.0}
    assert rejected == {"v": "Tensor is not a number; log numbers", "o": "object is not a number; log numbers"}


def test_a_tensor_is_read_when_it_is_logged() -> None:
    tensor = torch.tensor(1.0)
    event = encode((SCALARS, 0, 0, USER, {"x": tensor}))
    tensor.fill_(9)
    events, _ = decode_batch(encode_batch([event]))
    assert isinstance(events[0], Scalars)
    assert events[0].values == {"x": 1.0}
