"""What we know of the insides of TRL's trainers, and the only file that does: in whose hands the rows are, under which
names, in which versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from swanlab_ray.observer.trainers import internals
from swanlab_ray.observer.trainers.internals import LOSS

METRICS = "_metrics"
"""Where TRL's trainers keep metrics, by split; a framework's may gather none."""
MARK = "chosen_rewards"
"""The variable by which the function that computes them is known."""
GENERATION = "_generate_and_score_completions"
PHASES = internals.PHASES | {GENERATION: "generation", "_calculate_rewards": "rewards"}
"""Methods of a Trainer, of TRL's as well, and the phases of a step that they are."""
WATCHED = {"grpo": GENERATION, "rloo": GENERATION, "online_dpo": "training_step"}
"""The method that has an algorithm's rows in its hands, where that is not :data:`LOSS`."""
COMPUTES = (
    LOSS,
    "_compute_loss",
    "get_batch_loss_metrics",
    "concatenated_forward",
    "training_step",
    GENERATION,
    "_generate",
)
"""What rows are taken from."""
ALGORITHMS = {
    "odds_ratio_loss": "orpo",
    "cpo_loss": "cpo",
    "kto_loss": "kto",
    "dpo_loss": "dpo",
    GENERATION: "grpo",
}
"""What only one kind of trainer computes, for classes with names of their own."""
IGNORED = -100
"""Label of a token that is not trained on."""

PRIVATE = {
    "trl>=0.19": {
        "know a pair's rewards and losses": (
            "trl:DPOTrainer{chosen_rewards}",
            "trl:DPOTrainer{rejected_rewards}",
            "trl:DPOTrainer{ref_chosen_logps}",
            "trl:DPOTrainer{ref_rejected_logps}",
            "trl:DPOTrainer{chosen_logps}",
            "trl:DPOTrainer{rejected_logps}",
            "trl:DPOTrainer{losses}",
        ),
        "know what was generated": (
            "trl:GRPOTrainer._generate_and_score_completions(inputs)",
            "trl:GRPOTrainer().reward_weights",
        ),
        "measure rewards": ("trl:GRPOTrainer._calculate_rewards",),
        "know the algorithm of a trainer": ("trl:GRPOTrainer._compute_loss",),
    },
    "trl>=0.19,<0.29": {
        "know a pair's rewards and losses": (
            "trl:DPOTrainer{model_output}",
            "trl:DPOTrainer.concatenated_forward",
            "trl:DPOTrainer.get_batch_loss_metrics",
        ),
        "know the algorithm of a trainer": (
            "trl:DPOTrainer.dpo_loss",
            "trl:KTOTrainer.kto_loss",
            "trl:ORPOTrainer.odds_ratio_loss",
            "trl:CPOTrainer.cpo_loss",
        ),
    },
    "trl>=0.19,<0.20": {"know what was generated": ("trl:GRPOTrainer()._textual_logs",)},
    "trl>=0.20": {"know what was generated": ("trl:GRPOTrainer()._logs", "trl:GRPOTrainer._generate")},
    "trl>=0.26": {
        "know a pair's rewards and losses": (
            "trl.experimental.orpo:ORPOTrainer{chosen_rewards}",
            "trl.experimental.orpo:ORPOTrainer{policy_chosen_logps}",
            "trl.experimental.cpo:CPOTrainer{chosen_rewards}",
            "trl.experimental.cpo:CPOTrainer{policy_chosen_logps}",
        ),
        "know a duel": (
            "trl.experimental.online_dpo:OnlineDPOTrainer{prompts}",
            "trl.experimental.online_dpo:OnlineDPOTrainer{completions}",
            "trl.experimental.online_dpo:OnlineDPOTrainer{chosen_rewards}",
            "trl.experimental.online_dpo:OnlineDPOTrainer{chosen_indices}",
            "trl.experimental.online_dpo:OnlineDPOTrainer{rejected_indices}",
        ),
        "know the algorithm of a trainer": (
            "trl.experimental.orpo:ORPOTrainer.odds_ratio_loss",
            "trl.experimental.cpo:CPOTrainer.cpo_loss",
        ),
    },
    "trl>=0.29": {
        "take rows from a trainer that gathers no metrics": ("trl:DPOTrainer()._metrics",),
        "know a pair's rewards and losses": ("trl:DPOTrainer{per_sequence_loss}",),
    },
    "trl>=1.8": {
        "know a verdict": ("trl:KTOTrainer{chosen_rewards}", "trl:KTOTrainer{rejected_rewards}"),
    },
}
"""What we do with which of their names, by the versions that have them; ``tests/test_contracts.py`` looks for each. The
keys of batches and of records are covered by trainings of each version (``tests/test_rlhf.py``)."""


class Unknown(Exception):
    """The trainer does not hold what is looked for: another version than those this was written for."""


class Tokens(NamedTuple):
    """A column of token ids: of each row those where every ``(mask, wanted)`` is as wanted."""

    ids: Any
    masks: tuple[tuple[Any, bool], ...]
    second: bool = False
    """The rows of the batch's second half."""


Column = Tokens | Sequence[Any]
"""Token ids, or texts and messages."""


# Preference losses: the batch, and the local variables of the function that computed the metrics


def pair_texts(batch: Mapping[str, Any]) -> dict[str, Column]:
    """``prompt``, ``chosen`` and ``rejected`` of a batch of DPO, ORPO or CPO."""
    names = ("prompt", "chosen", "rejected")
    if all(_is_text(batch.get(name)) for name in names):  # ORPO, CPO
        return {name: batch[name] for name in names}
    if "completion_mask" in batch:  # DPO: the chosen ones, then the rejected ones
        ids, completion, present = batch["input_ids"], batch["completion_mask"], (batch["attention_mask"], True)
        return {
            "prompt": Tokens(ids, ((completion, False), present)),
            "chosen": Tokens(ids, ((completion, True), present)),
            "rejected": Tokens(ids, ((completion, True), present), second=True),
        }
    if "prompt_input_ids" in batch:  # DPO of TRL 0.15 to 0.28
        return {name: Tokens(batch[f"{name}_input_ids"], ((batch[f"{name}_attention_mask"], True),)) for name in names}
    return {
        "prompt": _before(batch, "chosen"),
        "chosen": _trained(batch, "chosen"),
        "rejected": _trained(batch, "rejected"),
    }


def judged_texts(batch: Mapping[str, Any]) -> dict[str, Column]:
    """``prompt`` and ``completion`` of a batch of KTO."""
    if "completion_mask" in batch:
        ids, completion, present = batch["input_ids"], batch["completion_mask"], (batch["attention_mask"], True)
        return {
            "prompt": Tokens(ids, ((completion, False), present)),
            "completion": Tokens(ids, ((completion, True), present)),
        }
    if _is_text(batch.get("completion")):
        return {"prompt": batch["prompt"], "completion": batch["completion"]}
    return {"prompt": _before(batch, "completion"), "completion": _trained(batch, "completion")}


def verdicts(batch: Mapping[str, Any]) -> Any:
    """Of a batch of KTO: whether each completion is a desirable one."""
    return batch["label"]


def _before(batch: Mapping[str, Any], side: str) -> Tokens:
    """What comes before the tokens that are trained on."""
    masks = ((batch[f"{side}_labels"] != IGNORED, False), (batch[f"{side}_attention_mask"], True))
    return Tokens(batch[f"{side}_input_ids"], masks)


def _trained(batch: Mapping[str, Any], side: str) -> Tokens:
    return Tokens(batch[f"{side}_input_ids"], ((batch[f"{side}_labels"] != IGNORED, True),))


def rewards_of(variables: Mapping[str, Any]) -> tuple[Any, Any]:
    """Rewards of the chosen and of the rejected samples, one each.

    Raises:
        Unknown: there are none.
    """
    chosen, rejected = variables.get(MARK), variables.get("rejected_rewards")
    if getattr(chosen, "ndim", 0) == getattr(rejected, "ndim", 0) == 1:
        return chosen, rejected
    raise Unknown("no per-sample rewards")


def logps_of(variables: Mapping[str, Any], side: str) -> tuple[Any, Any]:
    """Log probabilities of one side's samples, of the model and of its reference; None for what is not there."""
    older = variables.get("model_output")
    known = {**older, **variables} if isinstance(older, Mapping) else variables  # TRL below 0.29
    return known.get(f"policy_{side}_logps", known.get(f"{side}_logps")), known.get(f"ref_{side}_logps")


def losses_of(variables: Mapping[str, Any]) -> Any:
    """The loss of each pair; None where it is not there."""
    return variables.get("per_sequence_loss", variables.get("losses"))


# What was generated


class Generated(NamedTuple):
    """What the ranks have just generated, this rank's rows from ``first`` on."""

    first: int
    prompts: Sequence[Any]
    completions: Sequence[Any]
    rewards: Mapping[str, Sequence[float]]
    """By reward function."""
    weights: list[float]
    """Of the reward functions."""
    advantages: Sequence[float]


def generated_by(trainer: Any, prompts: int) -> Generated:
    """The record that GRPO and RLOO keep of all ranks' rows on every rank, given this rank's number of prompts.

    Raises:
        Unknown: there is none.
    """
    logs = getattr(trainer, "_logs", None) or getattr(trainer, "_textual_logs", None)  # of TRL 0.19
    if not isinstance(logs, Mapping) or not {"prompt", "completion", "rewards"} <= logs.keys():
        raise Unknown("no record of the completions")
    # The deques hold at most one generation of the whole job, and its end where it is larger than that.
    first = len(logs["prompt"]) - prompts * (trainer.accelerator.num_processes - trainer.accelerator.process_index)
    if first < 0:
        raise Unknown("the record of the completions is too short")
    rewards = logs["rewards"]
    weights = [float(weight) for weight in getattr(trainer, "reward_weights", [1.0] * len(rewards))]
    return Generated(first, logs["prompt"], logs["completion"], rewards, weights, logs.get("advantages", ()))


class Duels(NamedTuple):
    """Pairs that the model has just generated, and a judge or a reward has ordered."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    """All of them; the sides say which."""
    indices: dict[str, Any]
    rewards: dict[str, Any]
    """By side, ``chosen`` and ``rejected``."""
    scores: Any
    """Of the completions; None where a judge gives none."""


def duels_of(variables: Mapping[str, Any]) -> Duels:
    """What OnlineDPO's step has in its variables.

    Raises:
        Unknown: it has others.
    """
    sides = ("chosen", "rejected")
    names = ("prompts", "completions", *(f"{side}_{kind}" for side in sides for kind in ("rewards", "indices")))
    if not all(name in variables for name in names):
        raise Unknown("no completions")
    scores = variables.get("rewards")
    return Duels(
        variables["prompts"],
        list(variables["completions"]),
        {side: variables[f"{side}_indices"] for side in sides},
        {side: variables[f"{side}_rewards"] for side in sides},
        scores if getattr(scores, "ndim", 0) == 1 else None,
    )


def _is_text(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and bool(values) and isinstance(values[0], (str, list))
