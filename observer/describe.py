"""What a run's configuration says about model, training and parallelism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def run_config(args: Any, model: Any, state: Any, trainer: Any = None) -> dict[str, Any]:
    """Configuration of a Trainer's run: ``model``, ``training``, ``optimizer``, ``parallelism``, ``datasets``,
    ``deepspeed``.

    Args:
        args: ``TrainingArguments`` or a subclass.
        model: the model, or None.
        state: ``TrainerState``.
        trainer: the trainer, whose accelerator knows the parallelism, or None.
    """
    training = args.to_dict()
    config: dict[str, Any] = {
        "framework": "transformers",
        "model": _model(model),
        "training": training,
        "optimizer": {name: training.get(name) for name in _OPTIMIZER if name in training},
        "parallelism": _parallelism(args, getattr(trainer, "accelerator", None)),
        "datasets": _datasets(trainer),
        "max_steps": state.max_steps,
    }
    deepspeed = _deepspeed(args)
    if deepspeed:
        config["deepspeed"] = deepspeed
    return config


_OPTIMIZER = (
    "optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps",
)  # fmt: skip


def _model(model: Any) -> dict[str, Any]:
    if model is None:
        return {}
    described: dict[str, Any] = {"class": type(model).__name__}
    config = getattr(model, "config", None)
    if config is not None:
        described.update(config if isinstance(config, dict) else config.to_dict())
    if hasattr(model, "num_parameters"):
        described["parameters"] = model.num_parameters()
        described["trainable_parameters"] = model.num_parameters(only_trainable=True)
    if getattr(model, "peft_config", None):
        described["peft"] = {name: peft.to_dict() for name, peft in model.peft_config.items()}
    return described


def _parallelism(args: Any, accelerator: Any) -> dict[str, Any]:
    described: dict[str, Any] = {
        "world_size": args.world_size,
        "mode": str(getattr(args.parallel_mode, "value", args.parallel_mode)),
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
    }
    if getattr(args, "fsdp", None):
        described["fsdp"] = str(args.fsdp)
        described["fsdp_config"] = args.fsdp_config
    if accelerator is not None:
        described["distributed_type"] = str(accelerator.distributed_type.value)
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            described["fsdp_plugin"] = {name: str(value) for name, value in vars(plugin).items()}
        mesh = getattr(accelerator, "parallelism_config", None)
        if mesh is not None:  # context, tensor and data parallel sizes
            described.update({name: size for name, size in vars(mesh).items() if name.endswith("_size")})
    return described


def _datasets(trainer: Any) -> dict[str, int]:
    """How many samples each has; one that is streamed does not tell."""
    found: dict[str, Any] = {"train": getattr(trainer, "train_dataset", None)}
    evaluated = getattr(trainer, "eval_dataset", None)
    parts = evaluated if isinstance(evaluated, dict) else {"": evaluated}
    found |= {f"eval/{name}".rstrip("/"): part for name, part in parts.items()}
    return {name: len(dataset) for name, dataset in found.items() if hasattr(dataset, "__len__")}


def _deepspeed(args: Any) -> dict[str, Any] | None:
    """The DeepSpeed configuration, read from its file where a path is given."""
    given = getattr(args, "deepspeed", None)
    if isinstance(given, str) and given.lstrip()[:1] == "{":
        return dict(json.loads(given))
    if isinstance(given, str) and given:
        return {"file": given, **json.loads(Path(given).read_text())}
    return dict(given) if given else None
