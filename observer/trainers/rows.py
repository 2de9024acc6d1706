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
from swanlab_ray.observer.trainers.trl_internals import (
    Column,
    Tokens,
    Unknown,
    duels_of,
    generated_by,
    judged_texts,
    logps_of,
    losses_of,
    pair_texts,
    rewards_of,
    verdicts,
)


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

    def add(self, columns: Mapping[str, Column]) -> None:
        """Columns of text or token ids."""
        for name, column in columns.items():
            if isinstance(column, Tokens):
                self._tokens(name, column)
            else:
                self.text(name, column)

    def _tokens(self, name: str, column: Tokens) -> None:
        first = self.total if column.second else 0
        read = self._rows_of(column.ids, first)
        read_masks = [(self._rows_of(mask, first), wanted) for mask, wanted in column.masks]

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
    chosen, rejected = rewards_of(values)
    snapshot = Snapshot(len(chosen), limit)
    snapshot.add(pair_texts(batch))
    snapshot.numbers("reward_chosen", chosen)
    snapshot.numbers("reward_rejected", rejected)
    snapshot.then(lambda columns: _difference(columns, "reward_diff", "reward_chosen", "reward_rejected"))
    for side in ("chosen", "rejected"):
        logp, ref_logp = logps_of(values, side)
        snapshot.numbers(f"logp_{side}", logp)
        snapshot.numbers(f"ref_logp_{side}", ref_logp)
    if algorithm == "orpo":
        snapshot.then(_odds_ratio)
    if algorithm == "cpo":
        snapshot.then(lambda columns: _difference(columns, "logp_diff", "logp_chosen", "logp_rejected"))
    snapshot.numbers("loss", losses_of(values))
    return snapshot


def judged(batch: Mapping[str, Any], values: Mapping[str, Any], limit: int) -> Snapshot:
    """Completions with a verdict: KTO. Arguments as for :func:`pairs`.

    Raises:
        Unknown: there are no per-sample rewards.
    """
    rewards = rewards_of(values)
    labels = verdicts(batch)
    if sum(map(len, rewards)) != len(labels):
        raise Unknown("no per-sample rewards")
    snapshot = Snapshot(len(labels), limit)
    snapshot.add(judged_texts(batch))
    read_labels = snapshot.copied(labels) if hasattr(labels, "detach") else lambda: labels
    count = snapshot.rows
    snapshot.then(lambda columns: columns.update(label=[bool(label) for label in read_labels()[:count]]))
    logps = logps_of(values, "chosen")[0], logps_of(values, "rejected")[0]
    for name, (good, bad) in (("reward", rewards), ("logp", logps)):
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
    made = generated_by(trainer, prompts)
    snapshot = Snapshot(prompts, limit)

    def own(values: Sequence[Any]) -> list[Any]:
        return list(islice(values, made.first, made.first + snapshot.rows))

    snapshot.text("prompt", own(made.prompts))
    snapshot.text("completion", own(made.completions))
    rewards = {name: own(values) for name, values in made.rewards.items()}
    weights, advantages = made.weights, own(made.advantages)

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
    found = duels_of(values)
    snapshot = Snapshot(len(found.prompts), limit)
    snapshot.text("prompt", found.prompts)
    read_scores = None if found.scores is None else snapshot.copied(found.scores)
    count, completions = snapshot.rows, found.completions
    for side, indices in found.indices.items():
        read = snapshot.copied(indices)

        def pick(columns: Columns, side: str = side, read: Callable[[], Any] = read) -> None:
            places = read().tolist()[:count]
            columns[side] = [plain_text(completions[place]) for place in places]
            if read_scores is not None:
                given = read_scores().tolist()
                columns[f"score_{side}"] = [given[place] for place in places]

        snapshot.then(pick)
        snapshot.numbers(f"reward_{side}", found.rewards[side])
    snapshot.then(lambda columns: _difference(columns, "reward_diff", "reward_chosen", "reward_rejected"))
    return snapshot


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
