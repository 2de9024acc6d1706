"""What we know of the insides of Transformers, Accelerate and torch; the only file that does, but for
:mod:`swanlab_ray.observer.trainers.trl_internals`.

Where a trainer is of another kind or version something is not shown, and that is said; the training goes on.
"""

from __future__ import annotations

import sys
from typing import Any

LOSS = "compute_loss"
PHASES = {
    "_prepare_inputs": "prepare inputs",
    LOSS: "forward",
    "_save_checkpoint": "checkpoint",
    "evaluate": "evaluate",
}
"""Methods of a Trainer, and the phases of a step that they are."""
BATCHES = "get_batch_samples"
"""Takes the iterator of an epoch, returns the micro-batches of a step and how many tokens all ranks have in them."""
BACKWARD = "backward"
"""Method of Accelerate's ``Accelerator``."""
GATHERS = ("gather", "gather_for_metrics")
"""Those of its methods that a trainer gathers metrics with, before the function that has computed them returns."""

PRIVATE = {
    "transformers>=4.57": {
        "find the trainer that a callback belongs to": (
            "transformers:Trainer().callback_handler",
            "transformers.trainer_callback:CallbackHandler().callbacks",
        ),
        "measure the phases of a step": (
            "transformers:Trainer._prepare_inputs(inputs)",
            "transformers:Trainer._save_checkpoint",
            "transformers:Trainer.evaluate",
        ),
        "measure the wait for data, and count a rank's own tokens": (
            "transformers:Trainer.get_batch_samples(epoch_iterator, ...)",
        ),
        "show a rank's own loss": (
            "transformers:Trainer.training_step(model, inputs, ...)",
            "transformers:Trainer().model_accepts_loss_kwargs",
            "transformers:Trainer().compute_loss_func",
            "transformers:TrainingArguments().average_tokens_across_devices",
            "transformers:TrainingArguments.n_gpu",
        ),
        "take rows from what computes a loss": ("transformers:Trainer.compute_loss(model, inputs, ...)",),
    },
    "accelerate>=1.0": {
        "measure the backward pass": ("accelerate:Accelerator.backward(loss, ...)",),
        "take rows from what gathers metrics": (
            "accelerate:Accelerator.gather(tensor)",
            "accelerate:Accelerator.gather_for_metrics(input_data, ...)",
            "accelerate:Accelerator.sync_gradients",
        ),
    },
    "accelerate>=1.10": {
        "tell the ranks that share a batch": (
            "accelerate:Accelerator.parallelism_config",
            "accelerate:ParallelismConfig.non_data_parallel_size",
        ),
    },
    "torch>=2.4": {
        "agree on a run id where a script has made a process group": (
            "torch.distributed:distributed_c10d._get_default_store()",
        ),
    },
}
"""What we do with which of their names, by the versions that have them; ``tests/test_contracts.py`` looks for each."""


def has_callback(trainer: Any, callback: object) -> bool:
    """Whether a callback is one of a trainer's."""
    handler = getattr(trainer, "callback_handler", None)
    return handler is not None and any(one is callback for one in handler.callbacks)


def scales_losses(trainer: Any) -> bool:
    """Whether the Trainer's own ``compute_loss`` divides a rank's loss by the tokens of all ranks."""
    try:
        return bool(
            trainer.args.average_tokens_across_devices
            and trainer.args.n_gpu <= 1
            and trainer.accelerator.num_processes > 1
            and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func)
        )
    except Exception:  # a Trainer of before they did
        return False


def batches_at_once(accelerator: Any) -> int:
    """Ranks of one batch each; those that share a batch by context or tensor parallelism are one."""
    mesh = getattr(accelerator, "parallelism_config", None)
    return int(accelerator.num_processes // max(1, getattr(mesh, "non_data_parallel_size", 1)))


def default_store() -> Any:
    """The store of torch's default process group; None where there is none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    try:
        return distributed.distributed_c10d._get_default_store()
    except Exception:  # another torch
        return None
