"""Imports what jobs need, in the process that their processes are copies of."""

from __future__ import annotations

import gc
import inspect
from importlib import import_module

for _name in (
    "ray",
    "swanlab_ray.actors.writer.actor",
    "swanlab_ray.observer.session",
    "torch.distributed.run",
    "accelerate",
    "datasets",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.dpo_trainer",
    "trl.trainer.grpo_trainer",
):
    import_module(_name)

from swanlab_ray.observer import observer  # noqa: E402

# What is shown is that a run ends well, not how soon: the machine of the tests may need minutes to start a writer.
_finish = inspect.unwrap(observer.Observer.finish)
assert _finish.__defaults__ == ("success", None, observer.FINISH_TIMEOUT_S)
_finish.__defaults__ = ("success", None, 600.0)

gc.freeze()  # what was imported is not looked through for garbage, nor copied for that
