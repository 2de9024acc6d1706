"""Rows of completions from ``log_completions`` to the table, through a real writer in this process."""

from __future__ import annotations

import itertools
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from swanlab_ray.actors.completions.buffers import JOIN_PATIENCE_S, PATIENCE_S, TABLE, CompletionBuffer, CompletionRow
from swanlab_ray.actors.completions.tables import MEDIA_ITEMS, Decoder, Table, as_charts, as_texts, readable, table
from swanlab_ray.actors.delivery.queue import QUEUE_SCALARS, Sink
from swanlab_ray.actors.journal.reading import find_runs
from swanlab_ray.actors.wire.events import Completions, Tokenizer
from swanlab_ray.observer import connect
from swanlab_ray.observer.cli import main
from swanlab_ray.observer.history import transcripts, upload
from swanlab_ray.observer.trainers.algorithms import detect
from swanlab_ray.observer.transport.link import REFERENCE_BYTES
from tests.conftest import SharedCluster, wait_until
from tests.incarnations import Cluster, Link, mortal, rank, settings_for
from tests.swanlab_cloud import Fault, SwanLabCloud
from tests.swanlab_file import ended_run


def base(name: str, *parents: type) -> type:
    return type(name, parents or (object,), {})


DPO = base("DPOTrainer")


@pytest.mark.parametrize(
    ("kind", "algorithm"),
    [
        (DPO, "dpo"),
        (base("AxolotlDPOTrainer", DPO), "dpo"),
        (base("UnslothKTOTrainer"), "kto"),
        (base("_UnslothORPOTrainer"), "orpo"),
        (base("CPOTrainer"), "cpo"),
        (base("MyTrainer", base("GRPOTrainer")), "grpo"),
        (base("RLOOTrainer"), "rloo"),
        (base("AxolotlOnlineDPOTrainer"), "online_dpo"),
        (base("MyTrainer", base("UnslothGRPOTrainer")), "grpo"),
        (type("Renamed", (), {"cpo_loss": None, "get_batch_loss_metrics": None}), "cpo"),
        (base("NashMDTrainer", base("OnlineDPOTrainer")), None),
        (base("AsyncGRPOTrainer"), None),
        (base("SDPOTrainer"), None),
        (base("DPPOTrainer"), None),
        (base("SFTTrainer", base("Trainer")), None),
        (base("RewardTrainer"), None),
        (base("Trainer"), None),
    ],
)
def test_the_algorithm_is_known_by_the_class(kind: type, algorithm: str | None) -> None:
    assert detect(kind()) == algorithm


class Buffer:
    """A buffer, and the tables that came out of it."""

    def __init__(self, size: int, interval: int, ranks: int = 1) -> None:
        self.tables: list[list[CompletionRow]] = []
        self.at: list[int] = []
        self.buffer = CompletionBuffer(size, interval, self._emit)
        self.buffer.set_ranks(set(range(ranks)), missing=0)
        self.now = 0.1

    def _emit(self, step: int, rows: list[CompletionRow]) -> None:
        self.at.append(step)
        self.tables.append(rows)

    def add(self, rank: int, step: int, rows: int = 1, left_out: int = 0) -> None:
        values = [f"{rank}.{step}.{number}" for number in range(rows)]
        self.buffer.add(rank, Completions(step, step, "", "", left_out, {"text": values}), self.now)

    def steps(self) -> list[list[tuple[int, int]]]:
        return [[(row.step, row.rank) for row in rows] for rows in self.tables]


def test_a_table_waits_until_every_rank_has_come_that_far() -> None:
    made = Buffer(100, interval=10, ranks=2)
    made.add(0, 1)
    made.buffer.passed(0, 1)
    made.buffer.tick(1.0)
    assert made.tables == []
    made.add(1, 1)
    made.buffer.passed(1, 1)
    made.buffer.tick(1.2)
    assert made.steps() == [[(1, 0), (1, 1)]]


def test_tables_come_every_interval_and_at_the_end() -> None:
    made = Buffer(100, interval=10)
    for step in range(1, 26):
        made.add(0, step)
        made.buffer.passed(0, step)
        made.buffer.tick(float(step))
    made.buffer.flush()
    assert [[step for step, _ in rows] for rows in made.steps()] == [
        [1],
        [*range(2, 12)],
        [*range(12, 22)],
        [22, 23, 24, 25],
    ]
    assert made.buffer.dropped == 0
    assert made.buffer.taken == 25


@pytest.mark.parametrize("ended", [False, True])
def test_tables_that_become_due_at_once_stay_apart(ended: bool) -> None:
    made = Buffer(100, interval=10)
    for step in (1, 11, 21, 22):
        made.add(0, step)
    if not ended:
        made.buffer.passed(0, 22)
        made.buffer.tick(1.0)
        assert made.steps() == [[(1, 0)], [(11, 0)], [(21, 0)]]
    made.buffer.flush()
    assert made.steps() == [[(1, 0)], [(11, 0)], [(21, 0)], [(22, 0)]]


def test_a_silent_rank_does_not_hold_a_table_up() -> None:
    made = Buffer(100, interval=1, ranks=2)
    made.add(0, 1)
    made.buffer.tick(PATIENCE_S / 2)
    assert made.tables == []
    made.buffer.tick(PATIENCE_S + 1)
    assert made.steps() == [[(1, 0)]]


def test_a_rank_that_is_still_on_its_way_is_waited_for_longer() -> None:
    made = Buffer(100, interval=1)
    made.buffer.set_ranks({1}, missing=1)
    made.add(1, 1)
    made.buffer.passed(1, 1)
    made.buffer.tick(PATIENCE_S + 1)
    assert made.tables == []
    made.buffer.tick(JOIN_PATIENCE_S + 1)
    assert made.steps() == [[(1, 1)]]


def test_the_bound_takes_from_the_rank_that_has_most_and_is_counted() -> None:
    made = Buffer(8, interval=1, ranks=3)
    made.add(0, 1, rows=20, left_out=5)
    made.add(1, 1, rows=1)
    made.add(2, 1, rows=3)
    made.buffer.flush()
    (rows,) = made.tables
    assert sorted(row.rank for row in rows) == [0, 0, 0, 0, 1, 2, 2, 2]
    assert [row.cells["text"] for row in rows if row.rank == 0] == [f"0.1.{n}" for n in range(16, 20)]  # the latest
    assert made.buffer.dropped == 5 + 24 - 8


def test_a_due_table_goes_before_later_rows_push_it_out() -> None:
    made = Buffer(8, interval=1, ranks=2)
    for step in range(1, 5):
        made.add(0, step, rows=4)
        made.add(1, step, rows=4)
    made.buffer.flush()
    assert sum(len(rows) for rows in made.tables) == 32
    assert made.buffer.dropped == 0


def test_rows_that_come_after_their_table_get_one_of_their_own() -> None:
    """SwanLab keeps the first table of a step."""
    made = Buffer(100, interval=10, ranks=2)
    made.add(0, 5)
    made.buffer.tick(PATIENCE_S + 1)
    made.add(1, 5)
    made.buffer.flush()
    assert made.steps() == [[(5, 0)], [(5, 1)]]
    assert made.at == [5, 6]


def test_many_ranks_share_a_small_table() -> None:
    made = Buffer(128, interval=100, ranks=1024)
    for number in range(1024):
        made.add(number, 1, rows=1, left_out=7)
        made.buffer.passed(number, 1)
    made.buffer.tick(1.0)
    assert [len(rows) for rows in made.tables] == [128]
    assert made.buffer.dropped == 1024 * 8 - 128


def test_steps_that_are_run_again_replace_what_waits() -> None:
    made = Buffer(100, interval=100)
    for step in (1, 50, 90):
        made.add(0, step)
        made.buffer.passed(0, step)
    made.buffer.tick(1.0)  # the table of step 1
    made.buffer.rewind(0, 40)
    made.add(0, 45)
    made.buffer.flush()
    assert made.steps()[-1] == [(45, 0)]


def row(cells: dict[str, Any], rank: int = 0) -> CompletionRow:
    return CompletionRow(1, rank, 0, "", "", cells)


def plain(cell: Any, tokenizer: str) -> Any:
    return cell


def test_columns_are_the_union_in_a_fixed_order() -> None:
    made = table([row({"own": 1, "reward": 0.5, "prompt": "p"}), row({"rejected": "r", "chosen": "c"}, 1)], plain, 100)
    assert made.headers == ["step", "rank", "prompt", "chosen", "rejected", "reward", "own"]
    assert made.rows == [[1, 0, "p", None, None, 0.5, 1], [1, 1, None, "c", "r", None, None]]


def test_text_is_cut_with_a_mark_and_made_safe() -> None:
    cells = {"long": "x" * 50, "code": '"--x_x--0_0--"', "screen": "\x1b[2Ja\0b\tc\nd", "bad": float("nan")}
    made = table([row(cells)], plain, 20)
    values = dict(zip(made.headers, made.rows[0], strict=True))
    assert values["long"] == "x" * 20 + " [... 30 more characters]"
    assert values["screen"] == "␛[2Ja␀b\tc\nd"
    assert values["bad"] is None
    (chart,) = as_charts(made)
    assert json.loads(chart.dump_options())["rowData"][0]["long"] == values["long"]


def test_headers_are_unique_and_without_dots() -> None:
    cells = {"step": 7, "reward/org/model-0.5B": 1.0, "a.b": 1, "a_b": 2}
    assert table([row(cells)], plain, 20).headers == ["step", "rank", "step_", "reward/org/model-0_5B", "a_b", "a_b_"]


def test_a_table_above_the_limit_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 1 << 20
    monkeypatch.setattr("swanlab_ray.actors.completions.tables.MEDIA_BYTES", limit)
    whole = Table(["step", "rank", "text"], [[1, number, "€" * 30_000] for number in range(30)])
    charts = as_charts(whole)
    assert len(charts) > 1
    contents = [chart.dump_options() for chart in charts]
    assert max(len(content.encode()) for content in contents) < limit
    assert [shown["rank"] for content in contents for shown in json.loads(content)["rowData"]] == list(range(30))
    (chart,) = as_charts(Table(["text"], [["€" * limit]]))  # one cell alone is too large
    assert len(chart.dump_options().encode()) < limit


def test_texts_stay_within_what_a_step_can_hold() -> None:
    texts = as_texts(Table(["step", "rank", "text"], [[1, number, f"t{number}"] for number in range(300)]))
    assert len(texts) <= MEDIA_ITEMS
    assert all(f"text: t{number}" in "\n".join(text.content for text in texts) for number in range(300))
    assert readable(["a", "b", "c"], [0.123456789, None, "x\x1by"]) == "a: 0.123457\nc: x␛y"


def test_token_ids_without_their_tokenizer_are_shown_as_numbers() -> None:
    said: list[str] = []
    decoder = Decoder(said.append)
    ids = np.array([5, 70000], "<i4").tobytes()
    assert decoder.text(ids, "never sent") == "token ids 5 70000"
    decoder.learn(Tokenizer("broken", b"{}"))
    assert decoder.text(ids, "broken") == decoder.text(ids, "broken") == "token ids 5 70000"
    assert len(said) == 1
    assert "cannot load the ranks' tokenizer" in said[0]


ROWS = [
    {
        "prompt": [{"role": "user", "content": "2+2?"}, {"role": "user", "content": [{"type": "text", "text": "!"}]}],
        "completion": "4 \ud800",
        "reward": np.float32(0.5),
        "ok": True,
        "logp": torch.tensor(-1.5, requires_grad=True),
        "n": np.int64(3),
    },
    {"prompt": "3+3?", "completion": "7", "reward": float("nan"), "note": None},
]


def test_rows_of_the_user_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Two ranks log rows; they are in SwanLab's table once, in the journal, and shown by one command."""
    mortal(monkeypatch, swanlab=True)
    cluster = Cluster(settings_for(tmp_path, completion_log_interval=2))
    ranks = [rank(cluster, Link(cluster), number, 2) for number in range(2)]
    for step in range(1, 6):
        for observer in ranks:
            observer.log({"x": step}, step)
            observer.log_completions(row for row in ROWS)  # at the step of the last log()
    with caplog.at_level(logging.WARNING, "swanlab_ray"):
        ranks[0].log_completions([{"prompt": "p", "weird": {1, 2}}], 5)
        ranks[0].log_completions({"prompt": "p"})  # type: ignore[dict-item]
        ranks[0].log_completions([{"prompt": "p"}], -1)
        ranks[0].log_completions([])
        odd: dict[Any, Any] = {"prompt": "kept", "n": 10**400, 1: "one", "step": "[/nope] :fire: \u202e"}
        ranks[0].log_completions([odd], 5)
    assert "'weird' is not logged: set is neither text nor a number." in caplog.text
    assert "log_completions() takes a list of dicts, one for each sample, not {'prompt': 'p'}." in caplog.text
    assert "'n' is not logged: a whole number of 1329 bits is too large." in caplog.text
    assert "step -1 is negative" in caplog.text
    assert all(observer.finish() for observer in ranks)
    rows = ended_run(tmp_path).table(TABLE)
    assert sorted((found["step"], found["rank"], found["prompt"]) for found in rows) == sorted(
        [
            *((step, number, "user: 2+2?\nuser: !") for step in range(1, 6) for number in range(2)),
            *((step, number, "3+3?") for step in range(1, 6) for number in range(2)),
            (5, 0, "p"),
            (5, 0, "kept"),
        ]
    )
    assert next(found for found in rows if found["prompt"] == "kept")["1"] == "one"
    first = next(found for found in rows if found["completion"] == "4 ?")
    assert (first["reward"], first["ok"], first["logp"], first["n"]) == (0.5, True, -1.5, 3)
    shown = CliRunner().invoke(main, ["show", "r", "--completions", "--json", "--log-dir", str(tmp_path)])
    assert len(json.loads(shown.stdout)) == 20
    shown = CliRunner().invoke(main, ["show", "r", "--completions", "--last", "1", "--log-dir", str(tmp_path)])
    assert "step 5, rank" in shown.output
    shown = CliRunner().invoke(main, ["show", "r", "--completions", "--log-dir", str(tmp_path)])
    assert "completion: 7" in shown.output
    assert "step_: [/nope] :fire: \ufffd" in shown.output
    told = CliRunner().invoke(main, ["show", "r", "--log-dir", str(tmp_path)]).output
    assert "completions: 22 rows, 0 more than the tables' bound" in told


def test_the_local_dashboard_gets_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mortal(monkeypatch, swanlab=True)
    cluster = Cluster(settings_for(tmp_path, mode="local"))
    observer = rank(cluster, Link(cluster))
    observer.log_completions(ROWS, 3)
    assert observer.finish()
    run = ended_run(tmp_path)
    assert run.captions[TABLE][3] == ["step 3 rank 0"] * 2
    assert run.media[TABLE][3][0].startswith("prompt: user: 2+2?\nuser: !\ncompletion: 4 ?\nreward: 0.5\n")


def test_a_run_without_completions_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path))
    observer = rank(cluster, Link(cluster))
    observer.log({"x": 1})
    assert observer.finish()
    shown = CliRunner().invoke(main, ["show", "r", "--completions", "--log-dir", str(tmp_path)])
    assert shown.exit_code == 1
    assert "Run 'r' has no completions" in shown.output


def contents(cloud: SwanLabCloud) -> dict[int, list[tuple[int, str]]]:
    return {step: [(found["rank"], found["text"]) for found in rows] for step, rows in cloud.tables(TABLE).items()}


@pytest.mark.parametrize(
    "fault",
    [
        Fault("presigned/put", 500, 2),
        Fault("house/metrics", 500, 3, applied=True),
        Fault("house/metrics", 429, 2),
        Fault("series", 0, 1),
    ],
    ids=["no place", "answer lost", "too many", "cut"],
)
def test_tables_arrive_in_the_cloud_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Whatever the server does meanwhile, and however often they are uploaded again."""
    mortal(monkeypatch, swanlab=True)
    monkeypatch.setattr("swanlab_ray.actors.delivery.cloud.RETRY_S", (0.02, 0.2))
    with SwanLabCloud() as cloud:
        for name, value in cloud.environment().items():
            monkeypatch.setenv(name, value)
        cloud.faults.append(fault)
        cluster = Cluster(settings_for(tmp_path, mode="cloud", completion_log_interval=2))
        observer = rank(cluster, Link(cluster))
        for step in range(1, 8):
            observer.log_completions([{"text": f"row {step}"}], step)
            observer.progress(step)
            if step == 4:
                assert observer.flush()
                cluster.kill()  # the next writer goes on in the same experiment
        assert observer.finish()
        whole = contents(cloud)
        assert list(itertools.chain(*whole.values())) == [(0, f"row {step}") for step in range(1, 8)]
        assert sum(synced.tables for synced in upload.sync(tmp_path)) == 0
        cloud.only().media.clear()
        assert sum(synced.tables for synced in upload.sync(tmp_path)) == len(whole)
        assert contents(cloud) == whole


def test_what_a_resumed_training_has_run_again_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mortal(monkeypatch, swanlab=True)
    for steps, word in ((range(1, 6), "first"), (range(3, 8), "second")):
        cluster = Cluster(settings_for(tmp_path, completion_log_interval=1))
        observer = rank(cluster, Link(cluster))
        for step in steps:
            observer.log_completions([{"text": word}], step)
            observer.progress(step)
        assert observer.finish()
        cluster.kill()
    expected = [(1, "first"), (2, "first"), *((step, "second") for step in range(3, 8))]
    assert [(found["step"], found["text"]) for found in ended_run(tmp_path).table(TABLE)] == expected
    shown = CliRunner().invoke(main, ["show", "r", "--completions", "--json", "--log-dir", str(tmp_path)])
    assert [(found["step"], found["text"]) for found in json.loads(shown.stdout)] == expected


def test_tables_weigh_in_the_queue_and_are_counted_when_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SwanLab that takes nothing: what waits for it is bounded."""
    opened = threading.Event()

    class Stuck(Sink):
        waits = False

        def _open(self) -> None:
            opened.wait()
            raise RuntimeError("boom")

    stuck = Stuck("local", lambda sentence: None, lambda sink: None)
    for step in range(1000):
        stuck.write(step, 0, {}, Table(["text"], [["x" * 100_000]] * 2))
    assert len(stuck._rows) <= QUEUE_SCALARS // 2000 + 1
    opened.set()
    wait_until(lambda: stuck.completions_lost == 2000)


def test_a_large_batch_arrives_by_reference(tmp_path: Path, in_cluster: SharedCluster) -> None:
    text = os.urandom(6 << 20).hex()
    observer = connect(project="p", mode="offline", log_dir=tmp_path, run_id=f"large-{os.getpid()}")
    observer.log_completions([{"text": text}], 1)
    assert observer.finish()
    (run,) = find_runs([tmp_path])
    assert run.paths[0].stat().st_size > REFERENCE_BYTES
    assert [row["text"] for row in transcripts.completions(run)] == [text]
    (shown,) = ended_run(tmp_path).table(TABLE)
    assert shown["text"].endswith(f"[... {len(text) - 2000} more characters]")
