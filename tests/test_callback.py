"""Real Trainers with the callback, reporting to a real writer in this process, with the real SwanLab."""

from __future__ import annotations

import base64
import copy
import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import GradientState
from ray import cloudpickle
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.observer import ObserverCallback, completions, connect, current
from swanlab_ray.observer.history import archive
from swanlab_ray.observer.trainers.run_config import run_config
from tests import tiny
from tests.conftest import Launch, SharedCluster, run_forked
from tests.incarnations import Cluster, Link, logged_in, mortal, settings_for
from tests.overlays import path_with
from tests.swanlab_file import RunFile, ended_run, only_run, read_run, run_dirs


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObserverSettings]:
    """Settings of a run whose writer is in this process."""
    mortal(monkeypatch, swanlab=True)
    settings = settings_for(tmp_path / "swanlog")
    cluster = Cluster(settings)
    monkeypatch.setattr("swanlab_ray.observer.session.RankLink", lambda settings, identity: Link(cluster))
    yield settings
    observer = current()
    if observer is not None:
        observer.finish("aborted", "the test left it open", timeout=20)


def finished(settings: ObserverSettings) -> RunFile:
    observer = current()
    assert observer is not None
    state, error = observer.result
    assert state is not None
    assert observer.finish(state, error)
    return ended_run(settings.log_dir)


def test_metrics_configuration_and_own_measurements(settings: ObserverSettings, tmp_path: Path) -> None:
    """Trainer logs under SwanLab's own names, each rank's loss and step time, and the configuration."""
    trainer = tiny.trainer(tmp_path, [ObserverCallback(settings)], eval_strategy="steps", eval_steps=2, seed=3)
    trainer.train()
    run = finished(settings)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert run.scalars["train/loss"] == pytest.approx({entry["step"]: entry["loss"] for entry in logged})
    assert set(run.scalars["eval/loss"]) == {2, 4}
    assert {"train/grad_norm", "train/learning_rate", "train/epoch", "train/global_step"} <= set(run.scalars)
    assert set(run.scalars["single_value/train_runtime"]) == {4}
    assert run.scalars["rank/0/loss"] == pytest.approx(run.scalars["train/loss"], abs=1e-3)
    assert set(run.scalars["rank/0/step_time"]) == {1, 2, 3, 4}
    assert min(run.values("rank/0/step_time")) > 0
    config = run.config
    assert config["model"]["class"] == "LlamaForCausalLM"
    assert config["model"]["hidden_size"] == 16
    assert config["model"]["parameters"] == tiny.model().num_parameters()
    assert config["training"]["per_device_train_batch_size"] == 2
    assert config["optimizer"]["learning_rate"] == trainer.args.learning_rate
    assert config["parallelism"]["world_size"] == 1
    assert config["max_steps"] == 4
    assert run.state == "finished"


def test_own_loss_sums_the_micro_batches(settings: ObserverSettings, tmp_path: Path) -> None:
    tiny.trainer(tmp_path, [ObserverCallback(settings)], gradient_accumulation_steps=3).train()
    run = finished(settings)
    assert run.scalars["rank/0/loss"] == pytest.approx(run.scalars["train/loss"], abs=1e-3)


def test_training_is_the_same_with_and_without(settings: ObserverSettings, tmp_path: Path) -> None:
    """Bit-identical weights."""
    weights = []
    for callbacks in ([], [ObserverCallback(settings)]):
        trainer = tiny.trainer(tmp_path, callbacks)
        trainer.train()
        weights.append(torch.cat([parameter.flatten() for parameter in trainer.model.parameters()]))
    assert torch.equal(*weights)
    finished(settings)


def test_evaluate_only_is_a_run_with_its_metrics(settings: ObserverSettings, tmp_path: Path) -> None:
    tiny.trainer(tmp_path, [ObserverCallback(settings)]).evaluate()
    run = finished(settings)
    assert set(run.scalars["eval/loss"]) == {0}
    assert run.config["model"]["class"] == "LlamaForCausalLM"
    assert run.state == "finished"


def test_trained_twice_goes_on_in_its_steps(settings: ObserverSettings, tmp_path: Path) -> None:
    """SwanLab keeps the first value of a step, so the second training must not start at step 1 again."""
    trainer = tiny.trainer(tmp_path, [ObserverCallback(settings)])
    trainer.train()
    trainer.train()
    trainer.evaluate()
    run = finished(settings)
    assert set(run.scalars["train/loss"]) == set(range(1, 9))
    assert set(run.scalars["rank/0/loss"]) == set(range(1, 9))
    assert set(run.scalars["eval/loss"]) == {8}


def test_resumed_from_a_checkpoint_keeps_its_steps(settings: ObserverSettings, tmp_path: Path) -> None:
    tiny.trainer(tmp_path, [], max_steps=2, save_strategy="steps", save_steps=2).train()
    resumed = tiny.trainer(tmp_path, [ObserverCallback(settings)])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    run = finished(settings)
    assert set(run.scalars["train/loss"]) == set(run.scalars["rank/0/loss"]) == {3, 4}


def test_auto_find_batch_size_is_one_run_that_succeeds(settings: ObserverSettings, tmp_path: Path) -> None:
    """Attempts run out of memory after their first step; the last one ends well, and its steps follow theirs."""

    failures = []

    class Greedy(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self._train_batch_size > 4 and self.state.global_step == 1:
                failures.append(self._train_batch_size)
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    callback = ObserverCallback(settings)
    tiny.trainer(tmp_path, [callback], Greedy, auto_find_batch_size=True, per_device_train_batch_size=5).train()
    run = finished(settings)
    assert run.state == "finished"
    assert failures
    assert set(run.scalars["train/loss"]) == set(range(1, len(failures) + 4 + 1))


def test_exception_is_the_result_and_passes_through(settings: ObserverSettings, tmp_path: Path) -> None:
    class Broken(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 2:
                raise ValueError("a bad batch")
            return super().training_step(*args, **kwargs)

    with pytest.raises(ValueError, match="a bad batch"):
        tiny.trainer(tmp_path, [ObserverCallback(settings)], Broken).train()
    run = finished(settings)
    assert run.state == "crashed"
    assert "ValueError: a bad batch" in run.error


def test_a_callback_added_later_watches_too(settings: ObserverSettings, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, [])
    trainer.add_callback(ObserverCallback(settings))
    trainer.train()
    assert set(finished(settings).scalars["rank/0/loss"]) == {1, 2, 3, 4}


def test_deepspeed_file_and_fsdp_are_described(tmp_path: Path) -> None:
    """Without DeepSpeed or a GPU: what is read is the arguments, which here are stand-ins."""
    file = tmp_path / "zero2.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    args = SimpleNamespace(
        to_dict=lambda: {"learning_rate": 1e-3},
        deepspeed=str(file),
        fsdp=["full_shard"],
        fsdp_config={"version": 2},
        world_size=4,
        parallel_mode="distributed",
        gradient_accumulation_steps=1,
    )
    accelerator = SimpleNamespace(
        distributed_type=SimpleNamespace(value="FSDP"),
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(reshard_after_forward=True)),
        parallelism_config=SimpleNamespace(cp_size=2, tp_size=1),
    )
    config = run_config(args, None, SimpleNamespace(max_steps=10), SimpleNamespace(accelerator=accelerator))
    assert config["deepspeed"] == {"file": str(file), "zero_optimization": {"stage": 2}}
    parallelism = config["parallelism"]
    assert (parallelism["cp_size"], parallelism["world_size"], parallelism["distributed_type"]) == (2, 4, "FSDP")
    assert parallelism["fsdp_config"] == {"version": 2}
    assert parallelism["fsdp_plugin"] == {"reshard_after_forward": "True"}


@dataclass
class Sizes:
    n_layer: int = 2


class Net(torch.nn.Module):
    """A model that is not of Transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 1)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"loss": self.linear(input_ids.float()).square().mean()}


class Unsized(torch.utils.data.IterableDataset[Any]):
    def __len__(self) -> int:
        raise TypeError("unknown")

    def __iter__(self) -> Iterator[Any]:
        yield from ()


def warnings_of(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return [sentence for sentence in said if words in sentence]


def test_what_cannot_be_described_costs_nothing_else(
    settings: ObserverSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A data set without a length, a number of parameters that is a number, arguments that cannot be put in a dict: the
    rest of the configuration is there, the user's own too, the phases are measured, and one sentence names what is not.
    """

    class Odd(Net):
        num_parameters = 5
        main_input_name = "none"

        @property
        def peft_config(self) -> Any:
            raise RuntimeError("https://me:s3cr3t@host " + "x" * 10_000)

    class Arguments(TrainingArguments):
        def to_dict(self) -> Any:
            raise RuntimeError("no dict")

    model: Any = Odd()
    model.config = Sizes()
    args = Arguments(str(tmp_path), max_steps=2, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True)
    callback = ObserverCallback(settings, {"mine": 1})
    trainer = Trainer(model, args, train_dataset=tiny.Tokens(), callbacks=[callback])
    trainer.eval_dataset = {"news": Unsized(), "wiki": tiny.Tokens()}
    trainer.args.deepspeed = "zero3.json"
    trainer.train()
    run = finished(settings)
    config = run.config
    assert config["mine"] == 1
    assert config["model"] == {"class": "Odd", "n_layer": 2, "parameters": 17, "trainable_parameters": 17}
    assert config["training"]["max_steps"] == config["max_steps"] == 2
    assert config["optimizer"]["learning_rate"] == args.learning_rate
    assert config["datasets"] == {"train": 64, "eval/wiki": 64}
    assert config["parallelism"]["world_size"] == 1
    assert "profiling/forward" in run.scalars
    (said,) = warnings_of(caplog, "Not in the configuration")
    assert said.startswith("Not in the configuration: model.peft (RuntimeError: https://***@host xxx")
    assert "datasets.eval/news (TypeError: unknown)" in said
    assert "deepspeed (ValueError: 'zero3.json' is no file here" in said
    assert len(said) < 600


@pytest.mark.parametrize("form", ["dict", "json", "base64", "urlsafe base64", "yaml", "file", "yaml file", "object"])
def test_deepspeed_s_configuration_in_every_form(tmp_path: Path, form: str) -> None:
    wanted = {"zero_optimization": {"stage": 3, "ratio": 0.5}, "text": "?>~" * 9}
    text = json.dumps(wanted)
    written = tmp_path / "zero.json"
    written.write_text(yaml.safe_dump(wanted) if form == "yaml file" else text)
    given = {
        "dict": wanted,
        "json": text,
        "base64": base64.b64encode(text.encode()).decode(),
        "urlsafe base64": base64.urlsafe_b64encode(text.encode()).decode(),
        "yaml": yaml.safe_dump(wanted),
        "object": SimpleNamespace(config=wanted),
    }.get(form, str(written))
    refused: list[str] = []
    args = SimpleNamespace(deepspeed=given)
    config = run_config(args, None, SimpleNamespace(max_steps=1), None, lambda name, why: refused.append(name))
    assert config["deepspeed"] == ({"file": str(written)} if "file" in form else {}) | wanted
    assert "deepspeed" not in refused


def test_a_relative_file_of_deepspeed_that_the_trainer_has_read_is_described(tmp_path: Path) -> None:
    args = SimpleNamespace(deepspeed="elsewhere.json", hf_deepspeed_config=SimpleNamespace(config={"zero": 1}))
    assert run_config(args, None, SimpleNamespace(max_steps=1))["deepspeed"] == {"zero": 1}


def test_the_configuration_is_that_of_the_training_also_after_an_evaluation(
    settings: ObserverSettings, tmp_path: Path
) -> None:
    trainer = tiny.trainer(tmp_path, [ObserverCallback(settings)], max_steps=3)
    trainer.evaluate()
    trainer.train()
    assert finished(settings).config["max_steps"] == 3


def test_metrics_of_odd_types_cost_no_others(
    settings: ObserverSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Numbers of all kinds and nested ones are there; what is no number is named, once."""
    odd = {
        "acc": np.float32(0.5),
        "zero_d": np.array(0.25),
        "one": np.array([0.75]),
        "nested": {"a": 1.0, "b": {"c": torch.tensor(2.0)}},
        "flag": np.bool_(True),
        "tensor": torch.tensor([0.5]),
        "text": "hello",
        "none": None,
        "list": [1, 2],
        "array": np.array([1.0, 2.0]),
        7: 8,
        "good": 0.9,
    }

    class Logs(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.log(dict(odd))

    numbers = {name: value for name, value in odd.items() if isinstance(name, str)}
    trainer = tiny.trainer(
        tmp_path, [ObserverCallback(settings), Logs()], max_steps=2, eval_strategy="steps", eval_steps=1
    )
    trainer.compute_metrics = lambda prediction: dict(numbers)
    trainer.train()
    run = finished(settings)
    there = {
        "acc": 0.5,
        "zero_d": 0.25,
        "one": 0.75,
        "nested/a": 1,
        "nested/b/c": 2,
        "flag": 1,
        "tensor": 0.5,
        "good": 0.9,
    }
    for prefix, expected in (("train", there | {"7": 8}), ("eval", there)):
        for name, value in expected.items():
            assert run.scalars[f"{prefix}/{name}"] == pytest.approx({1: value, 2: value}), name
    assert set(run.scalars["eval/loss"]) == {1, 2}
    said = [sentence.partition(" is not logged")[0] for sentence in warnings_of(caplog, "not logged")]
    named = [f"'{prefix}/{name}'" for prefix in ("train", "eval") for name in ("text", "none", "list", "array")]
    assert sorted(said) == sorted(named)


def test_nan_that_the_trainer_filters_is_in_the_rank_s_own_loss(settings: ObserverSettings, tmp_path: Path) -> None:
    """``logging_nan_inf_filter`` is on by default, and hides it from the Trainer's logs."""

    class Failing(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * (float("nan") if self.state.global_step == 3 else 1)

    tiny.trainer(tmp_path, [ObserverCallback(settings)], Failing).train()
    run = finished(settings)
    assert all(math.isfinite(value) for value in run.values("train/loss"))
    (files,) = find_runs([settings.log_dir])
    own = {step: values["loss"] for _, step, values in logged_in(files) if "loss" in values}
    assert [step for step, loss in own.items() if math.isnan(loss)] == [4]


def test_a_copy_of_a_trainer_trains_itself(settings: ObserverSettings, tmp_path: Path) -> None:
    """Copied or pickled: the copy's weights change, the original's do not, and the copy reports to the same run."""
    GradientState._reset_state()  # it holds a weak reference after a training, which nobody can pickle
    callback = ObserverCallback(settings)
    original = tiny.trainer(tmp_path, [callback])
    for copied in (copy.deepcopy(original), pickle.loads(cloudpickle.dumps(original))):
        before = [weights(original), weights(copied)]
        copied.train()
        assert torch.equal(weights(original), before[0])
        assert not torch.equal(weights(copied), before[1])
        (own,) = [each for each in copied.callback_handler.callbacks if isinstance(each, ObserverCallback)]
        assert own is not callback
        assert own.settings == callback.settings
    original.train()
    copy.deepcopy(original).train()
    run = finished(settings)
    assert set(run.scalars["train/loss"]) == set(run.scalars["rank/0/loss"]) == set(range(1, 17)), "four trainings"
    for kind in (pickle, cloudpickle):
        again = pickle.loads(kind.dumps(callback))
        assert again.settings == callback.settings


def test_what_is_no_trainer_costs_a_sentence(
    settings: ObserverSettings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given to the callback, or to the capture of completions; under ``strict`` it raises."""
    callback = ObserverCallback(settings)
    assert callback.attach(object()) is callback
    assert len(warnings_of(caplog, "the training goes on")) == 1
    with pytest.raises(Exception, match=r"weak|attribute"):
        ObserverCallback(settings.model_copy(update={"strict": True})).attach(object())

    class DPOTrainer:
        __slots__ = ("compute_loss",)

    observer = connect(settings)
    assert completions.attach(DPOTrainer(), observer) is None
    assert len(warnings_of(caplog, "Completions are not logged")) == 1


def test_each_trial_of_a_search_is_a_run(
    settings: ObserverSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``hyperparameter_search`` trains, one trial after the other; one that is begun again with a smaller batch is
    the same trial. Evaluations after a trial belong to it."""
    monkeypatch.setattr("swanlab_ray.observer.session.RankLink", lambda settings, identity: Link(Cluster(settings)))

    class Greedy(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self._train_batch_size > 3:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    named = settings.model_copy(update={"experiment_name": "search"})
    trainer = tiny.trainer(
        tmp_path, [ObserverCallback(named)], Greedy, auto_find_batch_size=True, per_device_train_batch_size=4
    )
    trainer.hp_search_backend = HPSearchBackend.RAY
    for rate in (1e-3, 1e-4):
        trainer.train(trial={"learning_rate": rate})
        trainer.evaluate()
    observer = current()
    assert observer is not None
    assert observer.finish()
    runs = [read_run(directory) for directory in run_dirs(settings.log_dir)]
    assert sorted(run.config["trial"]["learning_rate"] for run in runs) == [1e-4, 1e-3]
    for run in runs:
        assert run.state == "finished"
        assert set(run.scalars["train/loss"]) == {1, 2, 3, 4}
        assert set(run.scalars["eval/loss"]) == {4}
    assert {run.files.run_id for run in archive.load(settings.log_dir)} == {"r-1", "r-2"}


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_a_failing_observer_never_stops_training(
    settings: ObserverSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    callback = ObserverCallback(settings)
    trainer = tiny.trainer(tmp_path, [callback])
    monkeypatch.setattr(callback, "_tell_progress", lambda state: 1 / 0)
    trainer.train()
    assert trainer.state.global_step == 4
    failures = [record.message for record in caplog.records if "on_step_end failed" in record.message]
    assert failures == ["on_step_end failed: ZeroDivisionError: division by zero; the training goes on."]


@pytest.mark.parametrize("overlay", [None, "oldest", "newest"])
def test_a_rank_s_own_loss_is_per_token_of_its_own(tmp_path: Path, launch: Launch, overlay: str | None) -> None:
    """Two ranks with tokens in uneven numbers: also where the Trainer divides by those of all ranks, with several
    micro-batches, with a loss or a model of another kind."""
    source = "from tests.own_loss_job import main; from pathlib import Path; main(Path.cwd())"
    if overlay is None:
        done = run_forked(source, tmp_path, ranks=2)
    else:
        done = launch(source, ranks=2, forks=True, PYTHONPATH=path_with(overlay)).wait()
    assert done.code == 0, done.output
    for rank in range(2):
        results = json.loads((tmp_path / f"losses-{rank}.json").read_text())
        for name, (shown, true) in results.items():
            assert len(shown) == 2
            assert shown == pytest.approx(true, rel=1e-3), name


TRAIN_TWO_RANKS = """
    import sys
    from pathlib import Path
    from swanlab_ray.observer import ObserverCallback
    from tests import tiny
    trainer = tiny.trainer(Path("out"), [ObserverCallback()], ddp_backend="gloo")
    trainer.train()
    sys.exit(3)
"""


def test_two_ranks_report_each_its_own(tmp_path: Path, in_cluster: SharedCluster) -> None:
    """Under torchrun, closed by the exit alone: each rank's loss, their mean the Trainer's, one truthful end."""
    run_forked(TRAIN_TWO_RANKS, tmp_path, ranks=2)
    run = ended_run(tmp_path / "swanlog")
    assert set(run.scalars["rank/0/loss"]) == set(run.scalars["rank/1/loss"]) == {1, 2, 3, 4}
    assert run.scalars["rank/0/loss"] != run.scalars["rank/1/loss"]
    assert run.scalars["ranks/loss/mean"] == pytest.approx(run.scalars["train/loss"], abs=1e-3)
    assert set(run.scalars["ranks/step_time/argmax"]) == {1, 2, 3, 4}
    assert run.state == "crashed"


def test_trl_trainers_work_the_same(settings: ObserverSettings, tmp_path: Path) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        bf16=False, disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list([{"text": "a b c a b"}] * 16)
    SFTTrainer(
        tiny.model(), args, train_dataset=data, processing_class=fast, callbacks=[ObserverCallback(settings)]
    ).train()
    run = finished(settings)
    assert set(run.scalars["rank/0/loss"]) == set(run.scalars["train/loss"]) == {1, 2}
    assert run.state == "finished"
    assert only_run(settings.log_dir).path == run.path
