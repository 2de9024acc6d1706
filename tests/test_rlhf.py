"""Completions of real TRL trainers on tiny models: in one process and on two ranks, in several versions of TRL."""

from __future__ import annotations

import gc
import inspect
import json
import logging
import re
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swanlab_ray.actors.completions.buffers import TABLE
from swanlab_ray.observer import completions
from swanlab_ray.observer.history import transcripts
from tests import rlhf, tiny
from tests.conftest import Launch, SharedCluster, run_forked
from tests.incarnations import Cluster, Link, mortal, rank, settings_for
from tests.overlays import path_with
from tests.swanlab_file import only_run

ROOT = Path(__file__).parent.parent
STEPS, BATCH = 4, 4

Row = dict[str, Any]
Train = Callable[..., tuple[Any, list[Row]]]


def mean(rows: list[Row], name: str) -> float:
    values = [row[name] for row in rows]
    return float(sum(values)) / len(values)


def check(algorithm: str, rows: list[Row], logs: list[dict[str, Any]], offset: int = 0) -> None:
    """The rows of one training, of all ranks, are those whose means the trainer has logged."""
    logged = {entry["step"] + offset: entry for entry in logs if "loss" in entry}
    assert {row["step"] for row in rows} == logged.keys()
    for step, metrics in logged.items():
        there = [row for row in rows if row["step"] == step]
        if algorithm == "kto":
            for label, name in ((True, "rewards/chosen"), (False, "rewards/rejected")):
                judged = [row for row in there if row["label"] is label]
                assert mean(judged, "reward") == pytest.approx(metrics[name], abs=1e-5)
        elif algorithm in ("grpo", "rloo"):
            assert mean(there, "reward") == pytest.approx(metrics["reward"], abs=1e-5)
            assert mean(there, "advantage") == pytest.approx(0, abs=1e-5)
        else:
            assert mean(there, "reward_chosen") == pytest.approx(metrics["rewards/chosen"], abs=1e-5)
            assert mean(there, "reward_rejected") == pytest.approx(metrics["rewards/rejected"], abs=1e-5)
            assert mean(there, "reward_diff") == pytest.approx(metrics["rewards/margins"], abs=1e-5)
            assert mean(there, "logp_chosen") == pytest.approx(metrics["logps/chosen"], abs=1e-4)
        if algorithm == "orpo":
            assert mean(there, "log_odds_ratio") == pytest.approx(metrics["log_odds_ratio"], abs=1e-5)
        if algorithm == "cpo":
            assert mean(there, "logp_diff") == pytest.approx(
                metrics["logps/chosen"] - metrics["logps/rejected"], abs=1e-4
            )
    check_text(algorithm, rows)


def text(cell: str) -> str:
    """Without the end-of-sequence token, and the space that some tokenizers drop."""
    return cell.removesuffix("</s>").strip()


def check_text(algorithm: str, rows: list[Row]) -> None:
    questions = {rlhf.question(*sum_): sum_ for sum_ in rlhf.SUMS}
    for row in rows:
        a, b = questions[text(row["prompt"])]
        if algorithm in ("dpo", "orpo", "cpo"):
            assert text(row["chosen"]) == rlhf.good(a, b).strip()
            assert text(row["rejected"]) == rlhf.bad(a, b).strip()
        elif algorithm == "kto":
            assert text(row["completion"]) == (rlhf.good if row["label"] else rlhf.bad)(a, b).strip()
        elif algorithm == "grpo":
            assert row["reward/length"] == pytest.approx(len(row["completion"]) / 10)
            assert row["reward"] == pytest.approx(row["reward/length"] + row["reward/digits"])


@pytest.mark.parametrize(
    ("ranks", "overlay"),
    [(2, None), (1, "oldest"), (2, "newest")],
    ids=["2 ranks", "1 rank, the oldest TRL", "2 ranks, the newest TRL"],
)
@pytest.mark.takes(15)
def test_every_rank_s_rows_arrive_once_and_change_nothing(
    ranks: int, overlay: str | None, launch: Launch, tmp_path: Path, in_cluster: SharedCluster
) -> None:
    """All five algorithms in one run: rows of every rank, their means are TRL's metrics, training is the same to the
    bit.
    """
    source = "from tests.rlhf_job import main; from pathlib import Path; main(Path.cwd())"
    if overlay is None:
        done = run_forked(source, tmp_path, ranks)
    else:
        done = launch(source, ranks=ranks, forks=True, PYTHONPATH=path_with(overlay)).wait()
    assert done.code == 0, done.output
    results = [json.loads((tmp_path / f"results-{number}.json").read_text()) for number in range(ranks)]
    for result in results:
        for algorithm, trained in result.items():
            assert trained["weights"][0] == trained["weights"][1], algorithm
            assert trained["logs"][0] == trained["logs"][1], algorithm
    from swanlab_ray.actors.runs.finding import find_runs

    (run,) = find_runs([tmp_path])
    rows = list(transcripts.completions(run))
    for algorithm, trained in results[0].items():
        own = [row for row in rows if row["algorithm"] == algorithm]
        first = trained["offset"] + 1
        expected = [(step, number) for step in range(first, first + STEPS) for number in range(ranks)]
        assert [(row["step"], row["rank"]) for row in own] == [place for place in expected for _ in range(BATCH)]
        check(algorithm, own, trained["logs"][1], trained["offset"])
        enabled = rf"SwanLab RLHF completion logging enabled for {algorithm.upper()}Trainer (type: {algorithm})"
        assert done.output.count(enabled) == 1  # whatever the world size
    shown = only_run(tmp_path / "swanlog").table(TABLE)
    assert [(row["step"], row["rank"], row["prompt"]) for row in shown] == [
        (row["step"], row["rank"], row["prompt"]) for row in rows
    ]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Train in this process, reporting to a writer in this process: the trainer and the rows."""
    mortal(monkeypatch)

    def run(algorithm: str, interval: int = 1, **args: Any) -> tuple[Any, list[Row]]:
        cluster = Cluster(settings_for(tmp_path / "swanlog", completion_log_interval=interval))
        observer = rank(cluster, Link(cluster))
        trainer = rlhf.trainer(algorithm, tmp_path, **args)
        capture = completions.attach(trainer, observer)
        assert capture is not None
        method = capture._method
        trainer.train()
        capture.detach()
        assert method not in vars(trainer)
        assert not {"gather", "gather_for_metrics"} & vars(trainer.accelerator).keys()
        assert observer.finish()
        assert observer.statistics().dropped == {}
        return trainer, list(transcripts.completions(cluster.files))

    return run


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("algorithm", "args"),
    [
        ("dpo", {"dataset": rlhf.pairs(conversations=True)}),
        ("orpo", {"dataset": rlhf.pairs(conversations=True)}),
        ("dpo", {"precompute_ref_log_probs": True}),
        ("dpo", {"peft_config": lora}),
        ("kto", {"peft_config": lora}),
        ("dpo", {"dataloader_num_workers": 2}),
        ("dpo", {"gradient_checkpointing": True}),
        ("grpo", {"gradient_checkpointing": True}),
        ("kto", {"precompute_ref_log_probs": True}),
        ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
        ("dpo", {"loss_type": ["ipo"]}),
        ("rloo", {}),
        ("online_dpo", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "plain",
)
def test_kinds_of_data_and_training(train: Train, algorithm: str, args: dict[str, Any]) -> None:
    trainer, rows = train(algorithm, **{name: value() if callable(value) else value for name, value in args.items()})
    assert len(rows) == STEPS * BATCH
    logs = trainer.state.log_history
    if "dataset" in args:
        assert all("user: What is" in row["prompt"] and "The answer is" in row["chosen"] for row in rows)
        for step, metrics in enumerate(logs[:STEPS], 1):
            there = [row for row in rows if row["step"] == step]
            assert mean(there, "reward_chosen") == pytest.approx(metrics["rewards/chosen"], abs=1e-5)
    elif algorithm != "online_dpo":
        check(algorithm, rows, logs)
    else:
        for step, metrics in enumerate(logs[:STEPS], 1):
            there = [row for row in rows if row["step"] == step]
            assert mean(there, "reward_chosen") == pytest.approx(metrics["rewards/chosen"], abs=1e-5)
            assert all(row["score_chosen"] >= row["score_rejected"] for row in there)
            assert all(row["score_chosen"] == pytest.approx(len(row["chosen"]) / 10) for row in there)


def test_truncated_data_is_shown_as_it_was_trained_on(train: Train) -> None:
    trainer, rows = train("dpo", max_length=10)
    assert len(rows) == STEPS * BATCH
    for row in rows:
        a, b = next(sum_ for sum_ in rlhf.SUMS if rlhf.question(*sum_) == row["prompt"])
        assert row["rejected"] != rlhf.bad(a, b)
        assert rlhf.bad(a, b).startswith(row["rejected"])
    logs = trainer.state.log_history
    assert mean(rows[:BATCH], "reward_rejected") == pytest.approx(logs[0]["rewards/rejected"], abs=1e-5)


def test_with_gradient_accumulation_the_last_micro_batch_is_captured(train: Train) -> None:
    _, rows = train("dpo", gradient_accumulation_steps=3)
    assert [row["step"] for row in rows] == [step for step in range(1, STEPS + 1) for _ in range(BATCH)]
    _, rows = train("grpo", gradient_accumulation_steps=2)  # generates for both at once
    assert {row["step"] for row in rows if row["algorithm"] == "grpo"} == set(range(1, STEPS + 1))


def test_the_interval_samples_the_first_every_nth_and_the_last_step(train: Train) -> None:
    _, rows = train("dpo", interval=4, max_steps=11)
    assert sorted({row["step"] for row in rows}) == [1, 5, 9, 11]


def test_a_tokenizer_without_a_fast_backend_decodes_in_the_rank(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()
    assert not hasattr(slow, "backend_tokenizer")
    monkeypatch.setattr(rlhf, "tokenizer", lambda: slow)
    trainer, rows = train("dpo")
    check("dpo", rows, trainer.state.log_history)


def test_unknown_internals_disable_the_capture_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path / "swanlog", completion_log_interval=1))
    observer = rank(cluster, Link(cluster))
    found, _ = rlhf.home("DPO")

    class Changed(found):  # type: ignore[misc, valid-type]
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            return model(inputs["input_ids"]).logits.mean()

    trainer = rlhf.trainer("dpo", tmp_path, kind=Changed)
    with caplog.at_level(logging.WARNING, "swanlab_ray"):
        completions.attach(trainer, observer)
        trainer.train()
    assert trainer.state.global_step == STEPS
    assert observer.finish()
    (said,) = [record.getMessage() for record in caplog.records if "Completions" in record.getMessage()]
    assert said.startswith("Completions are not logged any more: the dpo trainer of trl ")
    assert "no variable chosen_rewards" in said
    assert "<locals>.Changed has its own _compute_loss" in said


def test_a_subclass_that_gathers_nothing_is_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As those of frameworks that copy the loss of a trainer, and log each rank's own metrics."""
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path / "swanlog", completion_log_interval=1))
    observer = rank(cluster, Link(cluster))
    found, _ = rlhf.home("DPO")
    source = textwrap.dedent(inspect.getsource(found._compute_loss))
    names = dict(vars(inspect.getmodule(found)))
    exec(re.sub(r"self\.accelerator\.gather(_for_metrics)?\(", "(", source), names)
    custom = type("CustomDPOTrainer", (found,), {"_compute_loss": names["_compute_loss"]})
    trainer = rlhf.trainer("dpo", tmp_path, kind=custom)
    kept = trainer._metrics
    with caplog.at_level(logging.WARNING, "swanlab_ray"):
        completions.attach(trainer, observer)
        trainer.train()
    assert trainer._metrics is kept
    assert observer.finish()
    assert "ompletions are not" not in caplog.text
    check("dpo", list(transcripts.completions(cluster.files)), trainer.state.log_history)


def test_attached_twice_captures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand and by the callback, and when training begins again without having ended."""
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path / "swanlog", completion_log_interval=1))
    observer = rank(cluster, Link(cluster))
    trainer = rlhf.trainer("grpo", tmp_path)
    first = completions.attach(trainer, observer)
    assert completions.attach(trainer, observer) is first
    trainer.train()
    assert observer.finish()
    rows = list(transcripts.completions(cluster.files))
    assert [row["step"] for row in rows] == [step for step in range(1, STEPS + 1) for _ in range(BATCH)]
    assert first is not None
    first.detach()
    assert not any("swanlab" in name for name in vars(trainer))


def test_completions_that_no_reward_function_judges_have_no_reward(train: Train) -> None:
    def sometimes(completions: list[str], **_: Any) -> list[float | None]:
        return [None if number % 2 else 1.0 for number, _ in enumerate(completions)]

    _, rows = train("grpo", reward_funcs=[sometimes])
    assert [row["reward"] == 1.0 for row in rows] == [number % 2 == 0 for number in range(STEPS * BATCH)]
    assert all(row["reward"] != row["reward"] for row in rows[1::2])


def test_reward_functions_of_one_name_cost_no_rows(train: Train) -> None:
    _, rows = train("grpo", reward_funcs=[lambda completions, **_: [1.0] * 4, lambda completions, **_: [2.0] * 4])
    assert len(rows) == STEPS * BATCH
    assert all({"prompt", "completion", "advantage", "reward/<lambda>"} <= row.keys() for row in rows)


def test_the_tokenizer_has_one_name_whatever_its_padding() -> None:
    backend = rlhf.tokenizer().backend_tokenizer
    before = completions._definition(backend)
    assert before is not None
    rlhf.tokenizer()(["a", "bb"], padding=True, truncation=True, max_length=3)
    assert completions._definition(backend) == before
    from tokenizers import Tokenizer

    assert Tokenizer.from_str(before.decode()).decode([1], skip_special_tokens=False) == "<s>"


def test_a_disabled_observer_captures_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from swanlab_ray.observer import connect

    observer = connect(project="p", mode="disabled")
    with caplog.at_level(logging.INFO, "swanlab_ray"):
        assert completions.attach(rlhf.trainer("dpo", tmp_path)) is None
    assert "ompletion" not in caplog.text
    assert observer.finish()


@pytest.mark.parametrize("fails", [False, True])
def test_variables_of_the_forward_pass_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Neither past the loss nor past an exception in it: they are the logits of the batch."""
    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path / "swanlog", completion_log_interval=1))
    observer = rank(cluster, Link(cluster))
    found, _ = rlhf.home("DPO")
    big: list[weakref.ref[Any]] = []

    class Watched(found):  # type: ignore[misc, valid-type]
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            chosen_rewards = rejected_rewards = torch.zeros(len(inputs["input_ids"]) // 2)
            logits = torch.zeros(1000)
            big.append(weakref.ref(logits))
            self.accelerator.gather(chosen_rewards + rejected_rewards)
            if fails:
                raise MemoryError
            return model(inputs["input_ids"]).logits.mean()

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            try:
                loss = super().training_step(*args, **kwargs)
            except MemoryError:
                loss = torch.tensor(0.0)
            assert big[-1]() is None
            return loss

    trainer = rlhf.trainer("dpo", tmp_path, kind=Watched)
    completions.attach(trainer, observer)
    gc.disable()
    try:
        trainer.train()
    finally:
        gc.enable()
    assert len(big) == STEPS
    assert observer.finish()


def test_a_trainer_that_has_only_the_name_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its training ends as without us, and so does one whose accelerator cannot be watched."""
    from transformers import Trainer

    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path / "swanlog"))
    observer = rank(cluster, Link(cluster))

    class GRPOTrainer(Trainer):
        pass

    with caplog.at_level(logging.WARNING, "swanlab_ray"):
        assert completions.attach(tiny.trainer(tmp_path, [], GRPOTrainer), observer) is None
        assert "no method _generate_and_score_completions" in caplog.text
        trainer = rlhf.trainer("dpo", tmp_path)
        monkeypatch.setattr(completions, "GATHERS", ("gather", "renamed"))
        capture = completions.attach(trainer, observer)
        trainer.train()
    assert capture is not None
    assert not capture.active
    assert "no attribute 'renamed'" in caplog.text
    capture.detach()
    capture.detach()
    assert trainer.state.global_step == STEPS
    assert "gather" not in vars(trainer.accelerator)
    assert observer.finish()


def test_rows_that_a_slow_flusher_costs_are_counted(tmp_path: Path) -> None:
    class Stuck:
        rank, world_size, tokenizers = 0, 1, {"x"}
        settings = settings_for(tmp_path, completion_log_interval=1)
        sent: list[Any] = []  # noqa: RUF012

        def send(self, event: Any) -> None:
            self.sent.append(event)

    stuck: Any = Stuck()
    trainer = rlhf.trainer("dpo", tmp_path, max_steps=7)
    capture = completions.attach(trainer, stuck)
    assert capture is not None
    trainer.train()
    assert capture.captured == completions.WAITING_CAPTURES
    assert capture._missed == 3 * BATCH


def test_supervised_fine_tuning_and_a_switch_are_skipped_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from trl import SFTTrainer

    mortal(monkeypatch)
    cluster = Cluster(settings_for(tmp_path, log_completions=False))
    observer = rank(cluster, Link(cluster))
    with caplog.at_level(logging.INFO, "swanlab_ray"):
        assert completions.attach(object.__new__(SFTTrainer), observer) is None
        assert completions.attach(rlhf.trainer("dpo", tmp_path), observer) is None
    assert "ompletion" not in caplog.text
    assert observer.finish()
    with pytest.raises(RuntimeError, match=r"call connect\(\) before attach\(trainer\)"):
        completions.attach(object())
