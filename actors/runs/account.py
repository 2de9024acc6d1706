"""What became of a rank's events: those in the journal, and what the rank has counted itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from swanlab_ray.actors.wire.messages import Counts


@dataclass(frozen=True, slots=True)
class Account:
    """Of some lives of a rank. Once they have ended, ``logged = received + spooled + sum(dropped)``."""

    received: int = 0
    """Events in the journal."""
    counts: Counts = field(default_factory=Counts)

    @classmethod
    def of(cls, received: int, counts: Counts) -> Account:
        """That of one life, which has logged at least what was received. What it has put aside and the journal has as
        well, since the answer never came, is in the journal."""
        logged = max(counts.logged, received)
        elsewhere = max(0, logged - received - sum(counts.dropped.values()))
        return cls(received, counts.model_copy(update={"logged": logged, "spooled": min(counts.spooled, elsewhere)}))

    def __add__(self, other: Account) -> Account:
        one, also = self.counts, other.counts
        dropped = dict(one.dropped)
        for reason, number in also.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + number
        counts = Counts(
            logged=one.logged + also.logged,
            spooled=one.spooled + also.spooled,
            dropped=dropped,
            refused=one.refused + also.refused,
        )
        return Account(self.received + other.received, counts)
