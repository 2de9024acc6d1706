from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch

from swanlab_ray.actors.protocol import SCALARS, USER, Scalars, decode_batch, encode_batch
from swanlab_ray.observer.values import encode, salvage


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


def test_salvage_keeps_what_is_a_number() -> None:
    rejected: dict[str, str] = {}
    kept = salvage({"x": 1, "v": torch.ones(3), "o": object(), "n": {"y": 2}}, rejected.__setitem__)
    assert kept == {"x": 1.0, "n/y": 2.0}
    assert rejected == {"v": "Tensor is not a number", "o": "object is not a number"}


def test_a_tensor_is_read_when_it_is_logged() -> None:
    tensor = torch.tensor(1.0)
    event = encode((SCALARS, 0, 0, USER, {"x": tensor}))
    tensor.fill_(9)
    events, _ = decode_batch(encode_batch([event]))
    assert isinstance(events[0], Scalars)
    assert events[0].values == {"x": 1.0}
