"""The loss that a rank has by itself in a step of a Trainer: per token of its own, whatever the Trainer divides by."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from swanlab_ray.observer.script.ending import headline
from swanlab_ray.observer.script.notices import warn_once
from swanlab_ray.observer.script.wrapping import Wrapped
from swanlab_ray.observer.trainers.internals import BATCHES, LOSS, batches_at_once, scales_losses


class OwnLoss:
    """Adds up the losses of a step's micro-batches, where they lie. No collective, no wait for a GPU is added.

    With ``average_tokens_across_devices`` a Trainer divides a rank's loss by the tokens of all ranks, and multiplies by
    the number of ranks. For gradients that is right; but a rank with a tenth of the tokens would show a tenth of its
    loss. The rank's own count is what the Trainer itself gathers before a step.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = weakref.ref(trainer)
        self._sum: Any = None
        self._factor: Any = None
        self._scaled = _computed_by_trainer(type(trainer))
        trainer.training_step = Wrapped(trainer.training_step, self._around_step)
        if callable(getattr(trainer, BATCHES, None)):
            setattr(trainer, BATCHES, Wrapped(getattr(trainer, BATCHES), self._around_batches))

    def take(self) -> Any:
        """The loss of the step that has ended, a tensor; None where there was none."""
        taken, self._sum = self._sum, None
        return taken

    def _around_step(self, training_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loss = training_step(*args, **kwargs)
        try:  # the Trainer has divided by the number of micro-batches already
            own = loss.detach() if self._factor is None else loss.detach() * self._factor
            self._sum = own if self._sum is None else self._sum + own
        except Exception as error:
            warn_once("own loss", f"A rank's own loss is not shown: {headline(error)[:200]}.")
        return loss

    def _around_batches(self, get_batch_samples: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._factor = None
        trainer = self._trainer()
        if trainer is None or not (self._scaled and scales_losses(trainer)):
            return get_batch_samples(*args, **kwargs)
        holder, gather, counts = vars(trainer.accelerator), trainer.accelerator.gather, []
        before = holder.get("gather")

        def seen(values: Any, *more: Any, **options: Any) -> Any:
            counts.append(values)
            return gather(values, *more, **options)

        holder["gather"] = seen
        try:
            batches = get_batch_samples(*args, **kwargs)
        finally:
            holder.pop("gather", None)
            if before is not None:
                holder["gather"] = before
        try:
            self._factor = _factor(trainer.accelerator, batches[1], counts)
        except Exception as error:
            warn_once("own loss", f"A rank's own loss is shown as the Trainer scales it: {headline(error)[:200]}.")
        return batches


def _factor(accelerator: Any, everyones: Any, counts: list[Any]) -> Any:
    """What takes a loss per token of all ranks to one per token of this rank.

    Args:
        accelerator: knows the number of ranks.
        everyones: tokens of all ranks; None where the Trainer has not counted.
        counts: what this rank has given to the gathering of it.
    """
    if everyones is None or not counts:
        return None
    own = counts[-1].sum().to(everyones.device).clamp(min=1)  # a rank that has none has no loss
    return everyones / (own * batches_at_once(accelerator))


def _computed_by_trainer(kind: type) -> bool:
    """Whether the loss comes from Transformers' own ``compute_loss``, which scales it: a subclass's may not ask it."""
    for base in kind.__mro__:
        if base is Trainer:
            return True
        method = vars(base).get(LOSS)
        code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
        if method is not None and (code is None or LOSS not in code.co_names):
            return False
    return False
