"""From what a trainer had in its hands to rows: which of its values is which column, and where the text is.

The training thread only copies (:func:`pairs`, :func:`judged`, :func:`generated`, :func:`duels`); the flusher puts the
copies in order. Text stays token ids, which the writer decodes.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from swanlab_ray.observer.encoding.cells import Columns, plain_text
from swanlab_ray.observer.encoding.numbers import HostCopy

IGNORED = -100
"""Label of a token that is not trained on."""


class Unknown(Exception):
    """The trainer does not hold what is looked for: another version than those this was written for."""


class Snapshot:
    """Copies of a batch's values, and how they become columns.

    Args:
        total: rows of the batch on this rank.
        rows: how many of them are copied.
    """

    def __init__(self, total: int, rows: int) -> None:
        self.total = total
        self.rows = min(total, rows)
        self.copies: list[HostCopy] = []
        self._read: dict[tuple[int, int], Callable[[], Any]] = {}
        self._steps: list[Callable[[Columns], None]] = []

    def columns(self) -> Columns:
        """The rows, column by column; for the flusher, once the copies have arrived.

        Raises:
            Unknown: a column has not one value for each row.
        """
        columns: Columns = {}
        for step in self._steps:
            step(columns)
        odd = {name: len(cells) for name, cells in columns.items() if len(cells) != self.rows}
        if odd:
            raise Unknown(f"{self.rows} rows, but {odd}")
        return columns

    def then(self, step: Callable[[Columns], None]) -> None:
        """Add columns to those there are by then. ``step`` must not refer to this snapshot."""
        self._steps.append(step)

    def numbers(self, name: str, tensor: Any) -> None:
        """A column of one number per row; nothing if that is not what is given."""
        if getattr(tensor, "ndim", 0) == 1 and len(tensor) >= self.rows:
            read = self.copied(tensor[: self.rows])
            self.then(lambda columns: columns.update({name: read().tolist()}))

    def text(self, name: str, values: Sequence[Any]) -> None:
        """A column of text that is there as strings or messages."""
        kept = list(values[: self.rows])
        self.then(lambda columns: columns.update({name: [plain_text(value) for value in kept]}))

    def tokens(self, name: str, ids: Any, *masks: tuple[Any, bool], first: int = 0) -> None:
        """A column of token ids: of each row those where every ``(mask, wanted)`` is as wanted."""
        read = self._rows_of(ids, first)
        read_masks = [(self._rows_of(mask, first), wanted) for mask, wanted in masks]

        def step(columns: Columns) -> None:
            chosen = [(mask().bool() == wanted) for mask, wanted in read_masks]
            columns[name] = [_packed(row, [mask[number] for mask in chosen]) for number, row in enumerate(read())]

        self.then(step)

    def _rows_of(self, tensor: Any, first: int) -> Callable[[], Any]:
        """Copy the rows from ``first`` on, once: ids and masks serve several columns. The batch keeps them alive."""
        key = (id(tensor), first)
        if key not in self._read:
            self._read[key] = self.copied(tensor[first : first + self.rows])
        return self._read[key]

    def copied(self, tensor: Any) -> Callable[[], Any]:
        """Copy a tensor to the host without waiting for a GPU; how to read it later."""
        if tensor.is_cuda:
            copy = HostCopy(tensor)
            self.copies.append(copy)
            return copy.read
        kept = tensor.detach().to("cpu", copy=True)
        return lambda: kept


def _packed(ids: Any, masks: Iterable[Any]) -> bytes:
    import torch

    kept = functools.reduce(operator.and_, masks)
    return bytes(ids[kept].to(torch.int32).numpy().astype("<i4").tobytes())


def pairs(algorithm: str, batch: Mapping[str, Any], values: Mapping[str, Any], limit: int) -> Snapshot:
    """Preference pairs: DPO, ORPO, CPO.

    Args:
        algorithm: which of them.
        batch: what ``compute_loss`` was given.
        values: the local variables of the function that computed the metrics.
        limit: rows wanted at the most.

    Raises:
        Unknown: there are no per-sample rewards.
    """
    chosen, rejected = _rewards(values)
    snapshot = Snapshot(len(chosen), limit)
    _pair_text(snapshot, batch)
    snapshot.numbers("reward_chosen", chosen)
    snapshot.numbers("reward_rejected", rejected)
    snapshot.then(lambda columns: _difference(columns, "reward_diff", "reward_chosen", "reward_rejected"))
    older = values.get("model_output")
    logps = {**older, **values} if isinstance(older, Mapping) else values  # TRL below 0.29
    for side in ("chosen", "rejected"):
        snapshot.numbers(f"logp_{side}", logps.get(f"policy_{side}_logps", logps.get(f"{side}_logps")))
        snapshot.numbers(f"ref_logp_{side}", logps.get(f"ref_{side}_logps"))
    if algorithm == "orpo":
        snapshot.then(_odds_ratio)
    if algorithm == "cpo":
        snapshot.then(lambda columns: _difference(columns, "logp_diff", "logp_chosen", "logp_rejected"))
    snapshot.numbers("loss", values.get("per_sequence_loss", values.get("losses")))
    return snapshot


def judged(batch: Mapping[str, Any], values: Mapping[str, Any], limit: int) -> Snapshot:
    """Completions with a verdict: KTO. Arguments as for :func:`pairs`.

    Raises:
        Unknown: there are no per-sample rewards.
    """
    chosen, rejected = _rewards(values)
    labels = batch["label"]
    if len(chosen) + len(rejected) != len(labels):
        raise Unknown("no per-sample rewards")
    snapshot = Snapshot(len(labels), limit)
    if "completion_mask" in batch:
        completion, present = (batch["completion_mask"], True), (batch["attention_mask"], True)
        snapshot.tokens("prompt", batch["input_ids"], (batch["completion_mask"], False), present)
        snapshot.tokens("completion", batch["input_ids"], completion, present)
    elif _is_text(batch.get("completion")):
        snapshot.text("prompt", batch["prompt"])
        snapshot.text("completion", batch["completion"])
    else:
        trained = batch["completion_labels"] != IGNORED
        snapshot.tokens(
            "prompt", batch["completion_input_ids"], (trained, False), (batch["completion_attention_mask"], True)
        )
        snapshot.tokens("completion", batch["completion_input_ids"], (trained, True))
    read_labels = snapshot.copied(labels) if hasattr(labels, "detach") else lambda: labels
    count = snapshot.rows
    snapshot.then(lambda columns: columns.update(label=[bool(label) for label in read_labels()[:count]]))
    for name, side in (("reward", "rewards"), ("logp", "logps")):
        good = values.get(f"chosen_{side}", values.get(f"policy_chosen_{side}"))
        bad = values.get(f"rejected_{side}", values.get(f"policy_rejected_{side}"))
        if getattr(good, "ndim", 0) == getattr(bad, "ndim", 0) == 1:
            snapshot.then(_by_label(name, snapshot.copied(good), snapshot.copied(bad)))
    return snapshot


def _by_label(name: str, good: Callable[[], Any], bad: Callable[[], Any]) -> Callable[[Columns], None]:
    """The values of the desirable and of the undesirable completions, in the order of the batch."""

    def step(columns: Columns) -> None:
        of = {True: iter(good().tolist()), False: iter(bad().tolist())}
        columns[name] = [next(of[bool(label)], None) for label in columns["label"]]

    return step


def generated(trainer: Any, prompts: int, limit: int) -> Snapshot:
    """What the model has just generated: GRPO, RLOO. TRL keeps the rows of all ranks on every rank.

    Args:
        trainer: the trainer.
        prompts: rows of this rank.
        limit: rows wanted at the most.

    Raises:
        Unknown: the trainer keeps no such rows.
    """
    logs = getattr(trainer, "_logs", None) or getattr(trainer, "_textual_logs", None)
    if not isinstance(logs, Mapping) or not {"prompt", "completion", "rewards"} <= logs.keys():
        raise Unknown("no record of the completions")
    snapshot = Snapshot(prompts, limit)
    # The deques hold at most one generation of the whole job, and its end where it is larger than that.
    first = len(logs["prompt"]) - prompts * (trainer.accelerator.num_processes - trainer.accelerator.process_index)
    if first < 0:
        raise Unknown("the record of the completions is too short")

    def own(values: Sequence[Any]) -> list[Any]:
        return list(islice(values, first, first + snapshot.rows))

    snapshot.text("prompt", own(logs["prompt"]))
    snapshot.text("completion", own(logs["completion"]))
    rewards = {name: own(values) for name, values in logs["rewards"].items()}
    weights = [float(weight) for weight in getattr(trainer, "reward_weights", [1.0] * len(rewards))]
    advantages = own(logs.get("advantages", ()))

    def step(columns: Columns) -> None:
        if len(rewards) == len(weights):  # TRL keeps functions of one name under one name
            columns["reward"] = [_weighted(row, weights) for row in zip(*rewards.values(), strict=True)]
        if advantages:
            columns["advantage"] = advantages
        columns.update({f"reward/{name}": values for name, values in rewards.items()})

    snapshot.then(step)
    return snapshot


def _weighted(rewards: tuple[float, ...], weights: list[float]) -> float:
    """The total reward as TRL computes it: functions that gave none are left out; NaN where all did."""
    given = [weight * value for weight, value in zip(weights, rewards, strict=True) if value == value]
    return sum(given) if given else math.nan


def duels(values: Mapping[str, Any], limit: int) -> Snapshot:
    """Pairs that the model has just generated, and a judge or a reward has ordered: OnlineDPO.

    Raises:
        Unknown: the trainer's step has other variables.
    """
    names = ("prompts", "completions", "chosen_rewards", "rejected_rewards", "chosen_indices", "rejected_indices")
    if not all(name in values for name in names):
        raise Unknown("no completions")
    snapshot = Snapshot(len(values["prompts"]), limit)
    snapshot.text("prompt", values["prompts"])
    completions = list(values["completions"])
    scores = values.get("rewards")
    read_scores = snapshot.copied(scores) if getattr(scores, "ndim", 0) == 1 else None
    count = snapshot.rows
    for side in ("chosen", "rejected"):
        read = snapshot.copied(values[f"{side}_indices"])

        def pick(columns: Columns, side: str = side, read: Callable[[], Any] = read) -> None:
            indices = read().tolist()[:count]
            columns[side] = [plain_text(completions[index]) for index in indices]
            if read_scores is not None:
                given = read_scores().tolist()
                columns[f"score_{side}"] = [given[index] for index in indices]

        snapshot.then(pick)
        snapshot.numbers(f"reward_{side}", values[f"{side}_rewards"])
    snapshot.then(lambda columns: _difference(columns, "reward_diff", "reward_chosen", "reward_rejected"))
    return snapshot


def _rewards(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """Rewards of the chosen and of the rejected samples, one each."""
    chosen, rejected = values.get("chosen_rewards"), values.get("rejected_rewards")
    if getattr(chosen, "ndim", 0) == getattr(rejected, "ndim", 0) == 1:
        return chosen, rejected
    raise Unknown("no per-sample rewards")


def _pair_text(snapshot: Snapshot, batch: Mapping[str, Any]) -> None:
    if all(_is_text(batch.get(name)) for name in ("prompt", "chosen", "rejected")):  # ORPO, CPO
        for name in ("prompt", "chosen", "rejected"):
            snapshot.text(name, batch[name])
    elif "completion_mask" in batch:  # DPO: the chosen ones, then the rejected ones
        ids, completion, present = batch["input_ids"], batch["completion_mask"], (batch["attention_mask"], True)
        snapshot.tokens("prompt", ids, (completion, False), present)
        snapshot.tokens("chosen", ids, (completion, True), present)
        snapshot.tokens("rejected", ids, (completion, True), present, first=snapshot.total)
    elif "prompt_input_ids" in batch:  # DPO of TRL 0.15 to 0.28
        for name in ("prompt", "chosen", "rejected"):
            snapshot.tokens(name, batch[f"{name}_input_ids"], (batch[f"{name}_attention_mask"], True))
    else:
        ids, trained = batch["chosen_input_ids"], batch["chosen_labels"] != IGNORED
        snapshot.tokens("prompt", ids, (trained, False), (batch["chosen_attention_mask"], True))
        for name in ("chosen", "rejected"):
            snapshot.tokens(name, batch[f"{name}_input_ids"], (batch[f"{name}_labels"] != IGNORED, True))


def _is_text(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and bool(values) and isinstance(values[0], (str, list))


def _difference(columns: Columns, name: str, one: str, other: str) -> None:
    if one in columns and other in columns:
        columns[name] = [a - b for a, b in zip(columns[one], columns[other], strict=True)]


def _odds_ratio(columns: Columns) -> None:
    """ORPO's ``log_odds_ratio`` per sample: log sigmoid of the log odds that chosen has over rejected."""
    import torch

    if "logp_chosen" in columns and "logp_rejected" in columns:
        chosen, rejected = (torch.tensor(columns[f"logp_{side}"]) for side in ("chosen", "rejected"))
        odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
        columns["log_odds_ratio"] = torch.nn.functional.logsigmoid(odds).tolist()
