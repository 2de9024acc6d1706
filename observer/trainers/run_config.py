"""What a run's configuration says about model, training and parallelism."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from swanlab_ray.observer.encoding.redact import plain
from swanlab_ray.observer.script.ending import headline

LONGEST_REASON = 160
"""Characters."""

Reject = Callable[[str, str], None]


def run_config(
    args: Any, model: Any, state: Any, trainer: Any = None, reject: Reject = lambda name, why: None
) -> dict[str, Any]:
    """Configuration of a Trainer's run: ``model``, ``training``, ``optimizer``, ``parallelism``, ``datasets``,
    ``deepspeed``, ``trial``. Never raises.

    Args:
        args: ``TrainingArguments`` or a subclass.
        model: the model, or None.
        state: ``TrainerState``.
        trainer: the trainer, whose accelerator knows the parallelism, or None.
        reject: ``reject(name, why)`` is told of a part that cannot be described, and is left out.
    """
    parts = _Parts("", reject)
    parts.add("framework", lambda: "transformers")
    parts.add("model", lambda: _model(model, reject))
    training: dict[str, Any] = parts.add("training", lambda: _training(args)) or {}
    parts.add("optimizer", lambda: {name: training.get(name) for name in _OPTIMIZER if name in training})
    parts.add("parallelism", lambda: _parallelism(args, getattr(trainer, "accelerator", None), reject))
    parts.add("datasets", lambda: _datasets(trainer, reject))
    parts.add("deepspeed", lambda: _deepspeed(args))
    parts.add("max_steps", lambda: state.max_steps or None)  # 0 before a training
    parts.add("trial", lambda: getattr(state, "trial_params", None))  # of a search for hyperparameters
    return parts.described


class _Parts:
    """Parts of a description, each by itself: what one of them raises costs no other."""

    def __init__(self, name: str, reject: Reject) -> None:
        self.described: dict[str, Any] = {}
        self._prefix = f"{name}." if name else ""
        self._reject = reject

    def add(self, name: str, describe: Callable[[], Any]) -> Any:
        """Describe a part; None says that there is nothing to say."""
        try:
            value = describe()
        except Exception as error:
            self._reject(f"{self._prefix}{name}", headline(error)[:LONGEST_REASON])
            return None
        if value is not None:
            self.described[name] = value
        return value


_OPTIMIZER = (
    "optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps",
)  # fmt: skip


def _training(args: Any) -> dict[str, Any]:
    try:
        return dict(args.to_dict())
    except Exception:  # a subclass with fields that it cannot describe
        return dict(plain(args))


def _model(model: Any, reject: Reject) -> dict[str, Any]:
    parts = _Parts("model", reject)
    if model is None:
        return parts.described
    parts.described["class"] = type(model).__name__
    config = parts.add("config", lambda: _model_config(getattr(model, "config", None)))
    parts.described.pop("config", None)
    parts.described.update(config or {})
    parts.add("parameters", lambda: _parameters(model, only_trainable=False))
    parts.add("trainable_parameters", lambda: _parameters(model, only_trainable=True))
    parts.add("peft", lambda: _adapters(getattr(model, "peft_config", None)))
    return parts.described


def _model_config(config: Any) -> dict[str, Any] | None:
    """A dict, a ``PretrainedConfig``, a dataclass, a namespace: whatever a model keeps there."""
    if config is None:
        return None
    described = config if isinstance(config, Mapping) else plain(config)
    return dict(described) if isinstance(described, Mapping) else {"config": described}


def _adapters(adapters: Any) -> dict[str, Any] | None:
    return {name: adapter.to_dict() for name, adapter in adapters.items()} if adapters else None


def _parameters(model: Any, only_trainable: bool) -> int | None:
    if callable(getattr(model, "num_parameters", None)):
        return int(model.num_parameters(only_trainable=only_trainable))
    if not callable(getattr(model, "parameters", None)):
        return None
    return sum(int(part.numel()) for part in model.parameters() if part.requires_grad or not only_trainable)


def _parallelism(args: Any, accelerator: Any, reject: Reject) -> dict[str, Any]:
    parts = _Parts("parallelism", reject)
    parts.add("world_size", lambda: args.world_size)
    parts.add("mode", lambda: str(getattr(args.parallel_mode, "value", args.parallel_mode)))
    parts.add("gradient_accumulation_steps", lambda: args.gradient_accumulation_steps)
    parts.add("fsdp", lambda: str(args.fsdp) if getattr(args, "fsdp", None) else None)
    parts.add("fsdp_config", lambda: args.fsdp_config if getattr(args, "fsdp", None) else None)
    if accelerator is not None:
        parts.add("distributed_type", lambda: str(accelerator.distributed_type.value))
        parts.add("fsdp_plugin", lambda: _attributes(getattr(accelerator.state, "fsdp_plugin", None)))
        sizes = parts.add("sizes", lambda: vars(getattr(accelerator, "parallelism_config", None) or object))
        parts.described.pop("sizes", None)  # context, tensor and data parallel
        parts.described.update({name: size for name, size in (sizes or {}).items() if name.endswith("_size")})
    return parts.described


def _attributes(plugin: Any) -> dict[str, str] | None:
    return None if plugin is None else {name: str(value) for name, value in vars(plugin).items()}


def _datasets(trainer: Any, reject: Reject) -> dict[str, int]:
    """How many samples each has; one that is streamed does not tell."""
    parts = _Parts("datasets", reject)
    found: dict[str, Any] = {"train": getattr(trainer, "train_dataset", None)}
    evaluated = getattr(trainer, "eval_dataset", None)
    given = evaluated if isinstance(evaluated, Mapping) else {"": evaluated}
    found |= {f"eval/{name}".rstrip("/"): part for name, part in given.items()}
    for name, dataset in found.items():
        if hasattr(dataset, "__len__"):
            parts.add(name, dataset.__len__)
    return parts.described


def _deepspeed(args: Any) -> dict[str, Any] | None:
    """DeepSpeed's configuration: as the Trainer has read it, else in any way in which one may be given."""
    given = getattr(args, "deepspeed", None)
    if not given:
        return None
    file = {"file": given} if isinstance(given, str) and os.path.isfile(given) else {}
    for holder in (given, getattr(args, "hf_deepspeed_config", None)):  # an HfDeepSpeedConfig holds it
        read = holder if isinstance(holder, Mapping) else getattr(holder, "config", None)
        if isinstance(read, Mapping):
            return {**file, **read}
    return {**file, **_parsed(Path(given).read_text() if file else str(given))}


def _parsed(text: str) -> dict[str, Any]:
    """JSON, the same as base64, or YAML.

    Raises:
        ValueError: it is none of these.
    """
    import yaml

    readers: tuple[Callable[[str], Any], ...] = (
        json.loads,
        lambda text: json.loads(
            base64.b64decode(text, altchars=b"-_" if {"-", "_"} & set(text) else b"+/", validate=True)
        ),
        yaml.safe_load,
    )
    for read in readers:
        with suppress(Exception):
            found = read(text)
            if isinstance(found, dict):
                return found
    raise ValueError(f"{text[:40]!r} is no file here, and neither JSON nor YAML")
