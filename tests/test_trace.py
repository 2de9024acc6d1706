"""``swanlab-ray trace`` and ``show --phases``: what is in the journal, on one clock."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from swanlab_ray.actors.journal.records import Alert, Arrived, Batch, Ended, Entry
from swanlab_ray.actors.wire.codec import encode_batch
from swanlab_ray.actors.wire.events import SCALARS, USER, Spans
from swanlab_ray.observer.cli import main
from swanlab_ray.observer.encoding.numbers import encode
from tests.journals import write_journal

MS = 10**6
BEGAN = 1_700_000_000 * 10**9
AHEAD = 5_000 * MS
"""By how much the second host's clock is ahead."""


def spans(rank: int, step: int, *records: tuple[str, int, int], thread: str = "training", at: int = 0) -> Batch:
    """A batch with spans, as name, begin and end in true milliseconds; sent 3 ms after the last one."""
    clock = BEGAN + (AHEAD if rank == 1 else 0)
    sent = max(end for _, _, end in records) + 3
    names = list(dict.fromkeys(name for name, _, _ in records))
    event = Spans(
        time_ns=clock + sent * MS,
        begin_ns=clock,
        dropped=0,
        names=names,
        threads=["training", thread],
        thread=[int(thread != "training")] * len(records),
        name=[names.index(name) for name, _, _ in records],
        step=[step] * len(records),
        begins=[begin * MS for _, begin, _ in records],
        durations=[(end - begin) * MS for _, begin, end in records],
        parents=[],
        gpu=[],
    )
    received = BEGAN + (sent + 2) * MS
    return Batch(rank, f"life{rank}", at, received, 1, encode_batch([encode(event)]))


def arrived(rank: int) -> Arrived:
    return Arrived(
        rank=rank,
        world_size=2,
        life=f"life{rank}",
        local_rank=0,
        host=f"host{rank}",
        pid=1,
        pid_namespace="n",
        time_ns=BEGAN,
    )


@pytest.fixture
def log_dir(tmp_path: Path) -> Path:
    """Two ranks on two hosts, whose clocks differ by 5 s; rank 1 is late with its data."""
    entries: list[Entry] = [arrived(0), arrived(1)]
    for step in range(3):
        begin = 1000 * step
        entries += [
            spans(0, step, ("data", begin, begin + 10), ("backward", begin + 50, begin + 700), at=10 * step),
            spans(1, step, ("data", begin, begin + 600), ("backward", begin + 640, begin + 700), at=10 * step),
        ]
    entries += [
        spans(0, 2, ("epoch", 0, 2800), at=40),  # around all of them
        spans(0, 2, ("copy", 100, 400), ("copy", 200, 500), thread="loader", at=50),
        Alert(text="something happened", time_ns=BEGAN + 2_500 * MS),
    ]
    write_journal(tmp_path, "traced", entries)
    return tmp_path


def run(*arguments: str, log_dir: Path) -> Result:
    return CliRunner().invoke(main, [*arguments, "--log-dir", str(log_dir)])


def traced(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    trace = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    assert trace["displayTimeUnit"] == "ms"
    events: list[dict[str, Any]] = trace["traceEvents"]
    return events


def check_format(events: list[dict[str, Any]]) -> None:
    """As the trace event format demands: each phase with its fields, and complete events of a line nest."""
    needed = {
        "X": {"name", "pid", "tid", "ts", "dur"},
        "i": {"name", "pid", "tid", "ts", "s"},
        "M": {"name", "pid", "tid", "args"},
    }
    lines: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in events:
        assert needed[event["ph"]] <= event.keys()
        assert event["ph"] == "M" or event["ts"] >= 0
        if event["ph"] == "X":
            lines.setdefault((event["pid"], event["tid"]), []).append(event)
    for line in lines.values():
        ends: list[float] = []
        for event in sorted(line, key=lambda event: (event["ts"], -event["dur"])):
            while ends and ends[-1] <= event["ts"]:
                ends.pop()
            assert not ends or event["ts"] + event["dur"] <= ends[-1] + 1e-3
            ends.append(event["ts"] + event["dur"])
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert named == lines.keys()


def test_one_timeline_of_all_ranks_on_one_clock(log_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    done = run("trace", "traced", "-o", str(output), log_dir=log_dir)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"15 spans of run traced in {output}: ")
    events = traced(output)
    check_format(events)
    begins = {
        (event["pid"], event["args"]["step"]): event["ts"]
        for event in events
        if event["ph"] == "X" and event["name"] == "data"
    }
    for step in range(3):
        assert begins[0, step] == pytest.approx(1_000_000 * step)
        assert begins[1, step] == pytest.approx(begins[0, step])
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {0: "rank 0 (host0)", 1: "rank 1 (host1)"}
    markers = [(event["name"], event["s"], event["ts"]) for event in events if event["ph"] == "i"]
    assert ("something happened", "g", pytest.approx(2_498_000)) in markers, "less what a message takes"
    assert [event["name"] for event in events if event["ph"] == "i" and event["pid"] == 1] == [
        "step 0",
        "step 1",
        "step 2",
    ]
    lines = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert list(lines.values()) == ["training", "loader", "loader (2)", "training"]
    on_training = [event["name"] for event in events if event["ph"] == "X" and (event["pid"], event["tid"]) == (0, 0)]
    assert on_training[0] == "epoch", "the span that ended last is the first of its line"
    assert len(on_training) == 7
    parents = {event["args"].get("parent") for event in events if event["ph"] == "X" and event["name"] == "backward"}
    assert parents == {"epoch", None}


def test_a_part_of_it_compressed(log_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json.gz"
    assert run("trace", "-o", str(output), "--steps", "1:1", log_dir=log_dir).exit_code == 0
    events = traced(output)
    check_format(events)
    assert [event["args"]["step"] for event in events if event["ph"] == "X"] == [1] * 4
    assert "something happened" not in {event["name"] for event in events}, "it was later"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "ten"], "--steps 'ten' is no range of steps: write it as 100:200"),
        (["--steps", "²:3"], "--steps '²:3' is no range of steps: write it as 100:200"),
        (["--steps", "9" * 5000 + ":"], "is no range of steps: write it as 100:200"),
        (["--steps", "5:2"], "--steps '5:2' is no range of steps: it ends before it begins."),
        (["--steps", "7:9"], "Run 'traced' has no spans in steps 7:9."),
        (["nobody"], "'nobody' names no run in"),
        (["-o", "nowhere/out.json"], "The trace cannot be written to 'nowhere/out.json': No such file or directory."),
    ],
)
def test_what_cannot_be_done_is_said(
    log_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace.json").write_text("mine")
    done = run("trace", *arguments, log_dir=log_dir)
    assert done.exit_code != 0
    assert said in done.output
    assert (tmp_path / "trace.json").read_text() == "mine"


def test_a_run_without_spans(tmp_path: Path) -> None:
    data = encode_batch([encode((SCALARS, 0, BEGAN, USER, {"x": 1.0}))])
    write_journal(tmp_path, "plain", [arrived(0), Batch(0, "life0", 0, BEGAN, 1, data)])
    for arguments in (["trace"], ["show", "--phases"]):
        done = run(*arguments, log_dir=tmp_path)
        assert done.exit_code == 1
        assert "Run 'plain' has no spans" in done.output


def test_where_the_time_went(log_dir: Path) -> None:
    done = run("show", "--phases", "--last", "2", log_dir=log_dir)
    assert done.exit_code == 0, done.output
    assert "mean of 2 steps, 1 to 2" in done.output
    assert "Straggler: rank 1, data" in done.output
    steps = json.loads(run("show", "--phases", "--json", log_dir=log_dir).stdout)
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert (steps[0]["straggler"], steps[0]["phase"]) == (1, "data")
    assert steps[0]["ranks"]["1"] == pytest.approx({"data": 0.6, "backward": 0.06, "other": 0.04})
    both = run("show", "--phases", "--completions", log_dir=log_dir)
    assert both.exit_code == 2
    assert "Choose one of" in both.output


def test_a_rank_that_went_to_another_host(tmp_path: Path) -> None:
    """Each span by the clock of the host it was on; also where the rank says hello after them, as in a spool."""
    moved = Arrived(**arrived(1).model_dump() | {"life": "second", "host": "host0"})
    there, here = spans(1, 1, ("data", 100, 200)), spans(0, 2, ("data", 300, 400))
    again = Batch(1, "second", 0, here.received_ns, 1, here.data)
    write_journal(tmp_path, "moved", [spans(0, 1, ("data", 100, 200)), arrived(0), arrived(1), there, moved, again])
    output = tmp_path / "t.json"
    assert run("trace", "-o", str(output), log_dir=tmp_path).exit_code == 0
    begins = [(event["pid"], event["args"]["step"], event["ts"]) for event in traced(output) if event["ph"] == "X"]
    assert begins == [(0, 1, 0), (1, 1, 0), (1, 2, 200_000)]
    assert run("trace", "-o", str(output), "--steps", "1:1", log_dir=tmp_path).exit_code == 0


def test_a_name_that_looks_like_markup_and_many_ranks(tmp_path: Path) -> None:
    entries: list[Entry] = [arrived(rank) for rank in range(8)]
    entries += [spans(rank, 1, ("[/]", 0, 10), ("b" * 40, 10, 30)) for rank in range(8)]
    write_journal(tmp_path, "names", entries)
    done = run("show", "--phases", log_dir=tmp_path)
    assert done.exit_code == 0, done.output
    assert "[/]" in done.output
    assert done.stdout.count("10 ms") == 8


def test_ended_lives_and_those_that_were_started_again(tmp_path: Path) -> None:
    """The last step of a life that ended counts; a life that runs a step again replaces it."""
    again = arrived(0)
    entries: list[Entry] = [
        again,
        spans(0, 1, ("data", 0, 10)),
        spans(0, 2, ("data", 20, 30), at=10),
        Ended(rank=0, life="life0", state="crashed", error=None, ended_ns=0, time_ns=BEGAN),
        Arrived(**again.model_dump() | {"life": "second"}),
    ]
    repeated = spans(0, 2, ("data", 50, 99), at=20)
    entries.append(Batch(0, "second", 0, repeated.received_ns, 1, repeated.data))
    write_journal(tmp_path, "resumed", entries)
    steps = json.loads(run("show", "--phases", "--json", log_dir=tmp_path).stdout)
    assert [(step["step"], step["ranks"]["0"]["data"]) for step in steps] == [(1, 0.01), (2, pytest.approx(0.049))]


def test_clocks_that_jump_and_spans_that_end_before_they_begin(tmp_path: Path) -> None:
    """A clock that is set between two batches of a host, durations below zero, an alert from before the first span:
    the file is a trace all the same, and no time in it or in the phases is negative."""
    back = spans(0, 2, ("data", -9_000_000, -8_999_000), ("forward", -8_999_000, -8_998_500), at=1)
    wrong = spans(0, 3, ("data", 50, 20), ("forward", 20, 20), at=2)
    far = spans(1, 3, ("data", 1 << 40, (1 << 40) + 5), at=0)
    entries: list[Entry] = [
        Alert(text="before all", time_ns=BEGAN - 3_600 * 1000 * MS),
        arrived(0),
        arrived(1),
        spans(0, 1, ("data", 0, 10), ("forward", 10, 30)),
        back,
        wrong,
        far,
    ]
    write_journal(tmp_path, "jumps", entries)
    output = tmp_path / "t.json"
    assert run("trace", "-o", str(output), log_dir=tmp_path).exit_code == 0
    events = traced(output)
    check_format(events)
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")
    assert sum(event["ph"] == "X" for event in events) == 7
    assert "before all" in {event["name"] for event in events}
    for step in json.loads(run("show", "--phases", "--json", log_dir=tmp_path).stdout):
        assert all(seconds >= 0 for phases in step["ranks"].values() for seconds in phases.values())
