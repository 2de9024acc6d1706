"""What people read of a run: every name as it is, in every command and view, on every terminal."""

from __future__ import annotations

import io
import json
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from swanlab_ray.actors.journal.records import Alert, Arrived, Batch, Closed, Ended, Entry, Finished, Header, Opened
from swanlab_ray.actors.log import log
from swanlab_ray.actors.wire.codec import encode_batch
from swanlab_ray.actors.wire.events import SCALARS, USER, Completions, Spans, Stacks
from swanlab_ray.actors.wire.messages import Counts
from swanlab_ray.actors.wire.naming import is_run_id
from swanlab_ray.actors.wire.status import Hang, RankStatus, WriterStatus
from swanlab_ray.actors.wire.text import one_line
from swanlab_ray.observer.cli import main
from swanlab_ray.observer.encoding.numbers import encode
from swanlab_ray.observer.looking import render, watch
from swanlab_ray.observer.script.notices import logger
from tests.journals import write_file

NASTY = (
    "[ablation] lr=1e-4",
    "KeyError: '[/INST]'",
    "lr[a]-1",
    "[red]x[/red] [/] [link=file:///etc/passwd]y",
    ":smile: \\[x]",
    "\x1b[31mred\x1b]0;title\x07\x9b2J",
    "nul\0tab\tbell\x07back\b",
    "two\nlines\r\nthree\u2028four",
    "right\u202eto\u2066left\u200f",
    "中文运行 名字",
    "👩\u200d👩\u200d👧 🇩🇪 e\u0301",
    "x" * 5000,
    "字" * 700,
    " ",
    "{}%s%d$HOME`id`",
)
STEERS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What must not reach a terminal."""
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40) | st.sampled_from(NASTY)


def everything_called(name: str, metric: str | None = None) -> list[Entry]:
    """A run in which everything that somebody can name has this name, metrics perhaps another."""
    metric = name if metric is None else metric
    life, now = "life", 1_700_000_000 * 10**9
    spans = Spans(now, now, 0, [name], [name], [0, 0], [0, 0], [1, 2], [0, 20], [10, 10], [], [])
    rows = Completions(1, now, name, "", 0, {name: [name], "score": [float("nan")]})
    stacks = Stacks(now, 1, name, None, [name], [[name]])
    scalars = (SCALARS, 1, now, USER, {metric: 1.0, "bad": float("nan")})
    data = encode_batch([encode(scalars), *map(encode, (spans, rows, stacks))])
    return [
        Arrived(
            rank=0,
            world_size=1,
            life=life,
            local_rank=0,
            host=name,
            pid=1,
            pid_namespace="",
            gpu=name,
            time_ns=now,
        ),
        Batch(0, life, 0, now, 4, data),
        Alert(text=name, time_ns=now),
        Opened(mode="offline", run_dir=name, url=name, time_ns=now),
        Ended(
            rank=0,
            life=life,
            state="crashed",
            error=name,
            ended_ns=now,
            counts=Counts(logged=5, dropped={metric: 1}),
            time_ns=now,
        ),
        Finished(state="crashed", error=name, time_ns=now),
        Closed(written=1, thinned=0, withheld=0, complete=True, completions=1, time_ns=now),
    ]


def header(run_id: str, kind: Any = "journal", **more: Any) -> Header:
    run_settings = {"project": run_id, "experiment_name": run_id, "mode": run_id}
    return Header(
        **{"kind": kind, "run_id": run_id, "epoch": 1, "host": run_id, "pid": 1, "settings": run_settings} | more
    )


def status_called(name: str) -> WriterStatus:
    counts = dict.fromkeys(
        ("max_steps", "received", "written", "thinned", "withheld", "completions", "completions_dropped"), 1
    ) | dict.fromkeys(("spans_dropped", "late", "rejected", "spooled", "dropped", "killed"), 2)
    rank = RankStatus(
        rank=0, host=name, pid=1, gpu=name, state="running", step=1, loss=float("nan"), step_time=0.1, error=name,
        silent=0.0, span=name, idle=1e3, logged=1, received=1, spooled=1, dropped=1,
    )  # fmt: skip
    return WriterStatus(
        run_id=name, project=name, experiment=name, mode=name, state="crashed", error=name, closed=False, pid=1,
        world_size=1, ranks=[rank], step=1, epoch=1.0, loss=float("inf"), learning_rate=None, journal=name,
        hang=Hang(number=1, seconds=9.0, text=name, stacks=name), straggler=name, lag=0.0, run_dir=name, url=name,
        notices=[name], **counts,
    )  # fmt: skip


def invoke(*arguments: str, log_dir: Path | None = None, **env: str) -> Result:
    where = ["--log-dir", str(log_dir)] if log_dir is not None else []
    done = CliRunner().invoke(main, [*arguments, *where], env=env)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def has(output: str, name: str) -> bool:
    """Whether a name can be read there, folded perhaps. Both are long, so pytest need not show them."""
    return squeezed(name) in squeezed(output)


def squeezed(text: str) -> str:
    """Without spaces and frames, which folding adds and takes away."""
    return re.sub(r"[\s│|]", "", text)


def test_a_name_stays_in_its_line() -> None:
    assert one_line("a\n\tb\u2028c\u200fd\ud800") == "a␊␉b\ufffdc\ufffdd\ufffd"
    assert one_line("中 é 👩\u200d👧") == "中 é 👩\u200d👧"


VIEWS: tuple[list[str], ...] = ([], ["--completions"], ["--phases"], ["--stacks"])


@settings(max_examples=25, deadline=None, print_blob=True)
@given(name=names, columns=st.sampled_from(["10", "40", "80", "400"]))
@example(name="[ablation] lr=1e-4", columns="80")
@example(name="KeyError: '[/INST]'", columns="40")
def test_any_name_through_every_command(name: str, columns: str) -> None:
    """No command fails, none lets a name steer the terminal, the name can be read, and JSON is JSON."""
    with tempfile.TemporaryDirectory(prefix="look [x] ") as folder:
        log_dir, shown = Path(folder), one_line(name)
        file = log_dir / "observer" / "there" / "journal-000001.log"
        write_file(file, header(name), everything_called(name))
        done = invoke("runs", log_dir=log_dir, COLUMNS=columns)
        assert done.exit_code == 0
        if is_run_id(name):
            assert squeezed(shown) in squeezed(done.stdout)
        outputs = [done]
        for view in VIEWS:
            done = invoke("show", *view, log_dir=log_dir, COLUMNS=columns)
            assert done.exit_code == 0, done.output
            folded = view == ["--phases"] and columns != "10"  # beside other cells
            assert folded or has(done.stdout, shown)
            outputs.append(done)
            as_json = invoke("show", *view, "--json", log_dir=log_dir)
            json.loads(as_json.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
            assert name in list(texts_of(json.loads(as_json.stdout))) or not name.isprintable()
        (run,) = json.loads(invoke("runs", "--json", log_dir=log_dir).stdout)
        assert run["experiment_name"] == name
        verified = invoke("verify", str(log_dir))
        assert verified.exit_code == 0
        traced = invoke("trace", "-o", str(log_dir / "t.json"), log_dir=log_dir)
        assert traced.exit_code == 0
        events = json.loads((log_dir / "t.json").read_text())["traceEvents"]
        assert [event["name"] for event in events if event["ph"] == "X"] == [name, name]
        nobody = invoke("show", "--log-dir", folder, "--", f"{name}?"[:100])
        assert nobody.exit_code == 1
        for done in (*outputs, verified, traced, nobody):
            assert not STEERS.search(done.output)


def texts_of(value: Any) -> Any:
    if isinstance(value, dict):
        for key, one in value.items():
            yield key
            yield from texts_of(one)
    elif isinstance(value, list):
        for one in value:
            yield from texts_of(one)
    else:
        yield value


@settings(max_examples=30, deadline=None, print_blob=True)
@given(name=names, width=st.sampled_from([10, 40, 80, 400]))
@example(name="KeyError: '[/INST]'", width=120)
def test_any_name_in_the_table_of_a_run_in_progress(name: str, width: int) -> None:
    status, shown = status_called(name), one_line(name)
    console = Console(file=io.StringIO(), width=width)
    console.print(watch.rank_table(status))
    render.say(console, watch.status_line(status))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert not STEERS.search(printed)
    assert has(printed, shown)
    assert json.loads(render.json_text([status]))[0]["run_id"] == name


SECRETS = "Connecting to https://me:hunter2@proxy:3128 failed, HF_TOKEN=hf_" + "a1" * 17


def test_no_command_prints_a_secret_that_stands_in_a_journal(tmp_path: Path) -> None:
    """As one of an older version may have written it; an address of a proxy stands in an alert, an error, a host."""
    entries = everything_called(SECRETS, "x")
    write_file(tmp_path / "observer" / "r" / "journal-000001.log", header("r"), entries)
    told = [invoke("trace", "-o", str(tmp_path / "t.json"), log_dir=tmp_path), invoke("verify", str(tmp_path))]
    for view in ([], ["--phases"], ["--stacks"]):
        told += [invoke("show", *view, *more, log_dir=tmp_path) for more in ([], ["--json"])]
    told += [invoke("runs", *more, log_dir=tmp_path) for more in ([], ["--json"])]
    for text in [*(done.output for done in told), (tmp_path / "t.json").read_text()]:
        assert "hunter2" not in squeezed(text)
        assert "hf_a1a1" not in squeezed(text)
    console = Console(file=io.StringIO(), width=400)
    console.print(watch.rank_table(status_called(SECRETS)))
    assert "hunter2" not in console.file.getvalue()  # type: ignore[attr-defined]
    assert "hunter2" not in render.json_text(status_called(SECRETS))


@pytest.mark.parametrize("name", NASTY)
def test_what_is_said_while_training_steers_no_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A rank quotes an error, the writer an alert; both may hold anything. Lines stay lines."""
    logger.handle(logging.makeLogRecord({"levelno": logging.WARNING, "msg": f"It failed: {name}"}))
    log(f"It failed: {name}")
    said = capsys.readouterr().err
    assert not STEERS.search(said)
    assert has(said, "Itfailed")


def test_a_standard_error_that_is_closed_costs_the_writer_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (None, io.TextIOWrapper(io.BytesIO())):
        monkeypatch.setattr("sys.stderr", stream)
        if stream is not None:
            stream.close()
        log("line")
