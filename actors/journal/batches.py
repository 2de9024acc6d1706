"""A run's batches as events: each batch once, and one that cannot be decoded costs no other."""

from __future__ import annotations

import logging
from collections import Counter
from functools import cache

from swanlab_ray.actors.journal.records import Batch
from swanlab_ray.actors.journal.seen import Sequence
from swanlab_ray.actors.wire.codec import Undecodable, decode_batch
from swanlab_ray.actors.wire.events import Event
from swanlab_ray.actors.wire.text import many

_logger = logging.getLogger("swanlab_ray")


class BatchReader:
    """Decodes the batches of one run for one reader of it, who is told of the first that cannot be decoded."""

    def __init__(self) -> None:
        self._sequence = Sequence()
        self.unread = 0
        """Batches that cannot be decoded."""
        self.rejected: Counter[int] = Counter()
        """Values and events that are wrong, by rank."""

    def events(self, batch: Batch) -> list[Event]:
        """The events of a batch; none where it was there before, or cannot be decoded."""
        if not self._sequence.take(batch):
            return []
        try:
            events, rejected = decode_batch(batch.data)
        except Undecodable as error:
            self.unread += 1
            if self.unread == 1:
                _tell(f"{undecodable(batch, error)}. Check the run's files with: swanlab-ray verify")
            return []
        if rejected:
            self.rejected[batch.rank] += len(rejected)
        return events


def undecodable(batch: Batch, error: Undecodable) -> str:
    """What is said of such a batch: its checksum is right, so it came like that."""
    return (
        f"Batch {batch.seq} of rank {batch.rank} ({many(batch.events, 'event')}) cannot be decoded and is left out "
        f"({error}): it was damaged before it was sent, or comes from another version of swanlab-ray"
    )


@cache
def _tell(sentence: str) -> None:
    """Once, however many readers read a run."""
    _logger.warning(sentence)
