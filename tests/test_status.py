"""What the writer says of its run in one line, at its end, and of a job that stands still."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from swanlab_ray.actors.wire.status import Hang, RankStatus, WriterStatus, duration, ending, standstill, status_line
from swanlab_ray.actors.wire.text import first_line, harmless, one_line

STANDS = Hang(number=1, seconds=125.0, text="Rank 1 is behind.", stacks="")


def rank(state: str = "running") -> RankStatus:
    return RankStatus(
        rank=0, host="h", pid=1, gpu=None, state=state, step=None, loss=None, step_time=None, error=None, silent=0.0,
        span="", idle=None, logged=0, received=0, spooled=0, dropped=0,
    )  # fmt: skip


def status(**values: Any) -> WriterStatus:
    nothing: dict[str, Any] = {
        field.name: 0 if field.type in (int, float) else None for field in msgspec.structs.fields(WriterStatus)
    }
    told = {"run_id": "r", "project": "p", "mode": "offline", "state": "running", "closed": False, "ranks": []}
    return WriterStatus(**(nothing | told | {"journal": "/log dir/r", "notices": [], "lag": 0.0} | values))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "running | ranks 0/0 | events 0 | written 0 | lag 0.0 s | dropped 0"),
        (
            {"step": 0, "world_size": 3, "ranks": [rank(), rank("lost"), rank()], "loss": 0.0},
            "running | step 0 | ranks 2/3 | loss 0 | events 0 | written 0 | lag 0.0 s | dropped 0",
        ),
        (
            {"state": "crashed", "step": 7, "max_steps": 90, "epoch": 1.234, "world_size": 1, "loss": 2.34567,
             "received": 5, "written": 6, "lag": 1.26, "dropped": 8, "completions": 9, "hang": STANDS,
             "straggler": "rank 3 in data", "spans_dropped": 10, "spooled": 11, "thinned": 12, "withheld": 13,
             "late": 14, "repeated": 15, "rejected": 16, "error": "\n  \nValueError: boom\nmore"},
            "crashed | step 7/90 | epoch 1.23 | ranks 0/1 | loss 2.346 | events 5 | written 6 | lag 1.3 s | "
            "dropped 8 | completions 9 | hangs | straggler rank 3 in data | spans dropped 10 | spooled 11 | "
            "thinned 12 | withheld 13 | "
            "late 14 | repeated 15 | rejected 16 | ValueError: boom",
        ),
    ],
)  # fmt: skip
def test_a_run_in_one_line(values: dict[str, Any], line: str) -> None:
    """What is not known, or did not happen, is not in it."""
    assert status_line(status(**values)) == line


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"state": "success"},
            "run r ended: success; /log dir/r (upload it with: swanlab-ray sync '/log dir/r')",
        ),
        (
            {"state": "crashed", "error": "rank 1: boom\nmore", "mode": "local", "run_dir": "/runs/1"},
            "run r ended: crashed, rank 1: boom; /runs/1",
        ),
        (
            {"state": "aborted", "mode": "cloud", "run_dir": "/runs/1", "url": "https://swanlab.cn/@me/p/runs/1"},
            "run r ended: aborted; https://swanlab.cn/@me/p/runs/1",
        ),
    ],
)
def test_how_a_run_ended_and_where_it_lies(values: dict[str, Any], sentence: str) -> None:
    assert ending(status(**values)) == sentence


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.6, "1 s"), (59.4, "59 s"), (59.6, "1 min"), (61, "1 min"), (3599, "59 min"), (3600, "1 h"),
        (7505, "2 h 5 min"), (86_399, "23 h 59 min"), (86_400, "1 d"), (86_400 + 60, "1 d 1 min"),
        (3 * 86_400 + 4 * 3600 + 300, "3 d 4 h"),
    ],
)  # fmt: skip
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_job_that_stands_still() -> None:
    assert standstill(STANDS) == "No rank has made a step for 2 min. Rank 1 is behind."


def test_a_text_of_somebody_else_s_steers_nothing() -> None:
    """Lines stay lines, but in what stands in one."""
    odd = "a\x00b\r\nc\td\x1b[1m\x7f\x9b\u202e\u2066\ud800\u200f\u2028é"
    assert harmless(odd) == "a␀b\nc\td␛[1m␡\ufffd\ufffd\ufffd\ufffd\u200f\u2028é"
    assert one_line(odd) == "a␀b␍␊c␉d␛[1m␡\ufffd\ufffd\ufffd\ufffd\ufffd\ufffdé"
    assert harmless("\r") == "␍"
    assert [one_line(text) for text in ("plain", "a\nb", "中文")] == ["plain", "a␊b", "中文"]
    assert [first_line(text) for text in ("", " \n", "\n a\nb", "a")] == ["", "", " a", "a"]
