"""Rows of completions from ``log_completions`` to the table, through a real writer in this process."""

from __future__ import annotations

import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from swanlab_ray.actors.completions.buffers import TABLE
from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.observer import connect
from swanlab_ray.observer.cli import main
from swanlab_ray.observer.history import transcripts, upload
from swanlab_ray.observer.ray_cluster.link import REFERENCE_BYTES
from swanlab_ray.observer.trainers.algorithms import detect
from tests.conftest import SharedCluster
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
