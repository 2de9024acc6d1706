"""Two ranks with ten and with a hundred tokens each: what each shows as its own loss. For torchrun."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from swanlab_ray.observer.trainers import own_loss
from tests import tiny

LENGTHS = (2, 15, 3, 11)


class Uneven(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Every second sample, the ones of rank 1, has many more tokens to learn."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(16) * (index + 3)) % tiny.VOCABULARY
        labels = ids.clone()
        labels[: 16 - LENGTHS[index % len(LENGTHS)]] = -100
        return {"input_ids": ids, "labels": labels}


class Plain(torch.nn.Module):
    """A model that does not take the number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.model()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids, labels=labels)


class Own(Trainer):
    """Computes its loss without asking the Trainer, which then scales nothing."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(**inputs).loss


class Asking(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


CASES: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
    "averaged": (Trainer, {"average_tokens_across_devices": True}),
    "averaged, two micro-batches": (Asking, {"average_tokens_across_devices": True, "gradient_accumulation_steps": 2}),
    "not averaged": (Trainer, {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2}),
    "of its own": (Own, {}),
    "a plain model": (Trainer, {"gradient_accumulation_steps": 2}),
}


def measured(name: str, output: Path) -> tuple[list[float], list[float]]:
    """What was shown at each step, and what is true: the mean over the tokens of this rank."""
    kind, args = CASES[name]
    trainer = tiny.trainer(
        output, [], kind, max_steps=2, per_device_train_batch_size=1, learning_rate=0.0, ddp_backend="gloo",
        seed=1, **args,
    )  # fmt: skip
    trainer.train_dataset = Uneven()
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    if name == "a plain model":
        trainer.model = trainer.model_wrapped = Plain()
        trainer.model_accepts_loss_kwargs = False
    watched, shown = own_loss.OwnLoss(trainer), []
    step = trainer.args.gradient_accumulation_steps
    seen: list[Any] = []
    inner = trainer.training_step

    def training_step(model: Any, inputs: Any, *rest: Any) -> Any:
        seen.append(inputs)
        loss = inner(model, inputs, *rest)
        if len(seen) % step == 0:
            shown.append(float(watched.take()))
        return loss

    trainer.training_step = training_step
    gathered = trainer.accelerator.gather
    trainer.train()
    assert trainer.accelerator.gather == gathered
    assert "gather" not in vars(trainer.accelerator)
    return shown, [true_loss(trainer.model, seen[at : at + step], name) for at in range(0, len(seen), step)]


def true_loss(model: Any, batches: list[Any], name: str) -> float:
    losses = [float(model(**batch).loss.detach()) for batch in batches]
    tokens = [int((batch["labels"][..., 1:] != -100).sum()) for batch in batches]
    if name == "a plain model":  # which means over batches
        return sum(losses) / len(losses)
    return sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)


def main(output: Path) -> None:
    results = {name: measured(name, output / "out") for name in CASES}
    (output / f"losses-{os.environ['RANK']}.json").write_text(json.dumps(results))
