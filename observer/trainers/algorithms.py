"""Which preference or RL algorithm a trainer runs, whatever library has subclassed or moved it."""

from __future__ import annotations

import re

from swanlab_ray.observer.trainers.trl_internals import ALGORITHMS, COMPUTES

SUPPORTED = ("dpo", "kto", "orpo", "cpo", "grpo", "rloo", "online_dpo")
"""Algorithms whose rows can be captured; SimPO is a loss of the CPO trainer."""

_TRAINERS = {
    "DPOTrainer": "dpo",
    "KTOTrainer": "kto",
    "ORPOTrainer": "orpo",
    "CPOTrainer": "cpo",
    "GRPOTrainer": "grpo",
    "RLOOTrainer": "rloo",
    "OnlineDPOTrainer": "online_dpo",
}
# Trainers of other algorithms, some of which extend one of those above or end like them.
_OTHERS = (
    *("A2PO", "AsyncGRPO", "BCO", "GKD", "GOLD", "MiniLLM", "NashMD", "PPO", "PPOv2"),
    *("PRM", "Reward", "SDFT", "SDPO", "SFT", "SSD", "TPO", "XPO"),
)
# After a letter in lower case or a digit: AxolotlDPOTrainer, but not DPPOTrainer.
_NAMED = re.compile(rf"(?:^|[a-z0-9_])({'|'.join([*_TRAINERS, *(f'{other}Trainer' for other in _OTHERS)])})$")


def class_name(owner: object) -> str:
    """Name of an object's class, or of a class; not of the one that Ray Train puts around that of a trainer."""
    kind = owner if isinstance(owner, type) else type(owner)
    return (kind.__mro__[1] if kind.__name__ == "RayTransformersTrainer" else kind).__name__


def detect(trainer: object) -> str | None:
    """The algorithm of a trainer, one of :data:`SUPPORTED`; None for any other, such as supervised fine-tuning.

    The class whose name says it decides, the most derived one first; the trainer's methods where no name does.
    """
    classes = [base.__name__ for base in type(trainer).__mro__]
    for exact in (True, False):
        for name in classes:
            found = _NAMED.search(name)
            if found and (found[1] == name or not exact):
                return _TRAINERS.get(found[1])
    return next((algorithm for method, algorithm in ALGORITHMS.items() if hasattr(trainer, method)), None)


def of_a_framework(trainer: object) -> str:
    """Says which class derived from the library's computes something in its own way; else nothing."""
    for base in type(trainer).__mro__:
        if base.__module__.partition(".")[0] in ("trl", "transformers"):
            return ""
        own = [name for name in COMPUTES if name in vars(base)]
        if own:
            return f": {base.__module__}.{base.__qualname__} has its own {' and '.join(own)}"
    return ""
