"""The ledger of a run: what became of every event of its ranks, from its journals and spools."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from swanlab_ray.actors.runs.account import Account
from swanlab_ray.actors.runs.summary import KILLED, Life, Summary
from swanlab_ray.actors.wire.messages import Counts


@dataclass(frozen=True, slots=True)
class Ledger:
    """What became of the events of one rank:
    ``logged = written + spooled + sum(dropped) + on_the_way + missing``.
    """

    rank: int
    lives: int
    state: str
    error: str | None
    host: str
    logged: int
    written: int
    """In the journal."""
    spooled: int
    """On a rank's own disk: in a spool that was found beside the journal, or by what the rank said."""
    dropped: dict[str, int]
    """By reason."""
    on_the_way: int
    """Counted by a rank that has not ended, and not in the journal yet."""
    missing: int
    """Was in the files and is not any more: damage. At least so many."""
    refused: int
    """Values, and whole calls, that the rank found wrong and are no events: no part of the sum."""


def ledgers(
    journal: Summary, everything: Summary, spooled: dict[tuple[int, str], int], spools: list[Path]
) -> Iterator[Ledger]:
    damaged = any(not found.damage.torn for found in journal.damaged)
    ranks = everything.ranks()
    for rank in sorted({rank for rank, _ in everything.lives}):
        lives = {life: whole for (number, life), whole in everything.lives.items() if number == rank}
        last = ranks[rank][-1] if rank in ranks else None
        written = logged = aside = on_the_way = missing = refused = 0
        dropped: dict[str, int] = {}
        for name, whole in lives.items():
            said = journal.lives.get((rank, name), Life())
            # What a rank has put aside tells more of its end than a writer that has lost it.
            ended = said.ended if said.ended and said.ended.state != "lost" else whole.ended
            counts = ended.counts if ended else Counts()
            lost = {reason: count for reason, count in counts.dropped.items() if reason != KILLED}
            counts = Account.of(said.events, counts.model_copy(update={"dropped": lost})).counts
            found = spooled.get((rank, name), 0)  # what the journal has as well is not counted twice
            kept = found if any(name in path.name for path in spools) else max(found, counts.spooled)
            refused += counts.refused
            rest = max(0, counts.logged - said.events - kept - sum(lost.values()))
            written, aside = written + said.events, aside + kept
            logged += said.events + kept + sum(lost.values()) + rest
            gone = sum(last - first + 1 for first, last in whole.missing)
            if gone or damaged:  # then nobody can say that it was never written
                missing += max(rest, gone)
                logged += max(0, gone - rest)
            elif ended is None:
                on_the_way += rest
            elif ended.state == "lost" and rest:
                lost[KILLED] = rest
            else:
                missing += rest
            for reason, count in lost.items():
                dropped[reason] = dropped.get(reason, 0) + count
        yield Ledger(
            rank=rank,
            lives=len(lives),
            state="unknown" if last is None else last.ended.state if last.ended else "running",
            error=last.ended.error if last and last.ended else None,
            host=last.arrived.host if last and last.arrived else "",
            logged=logged,
            written=written,
            spooled=aside,
            dropped=dropped,
            on_the_way=on_the_way,
            missing=missing,
            refused=refused,
        )


def with_rejected(accounts: Iterable[Ledger], rejected: Mapping[int, int]) -> Iterator[Ledger]:
    """The same with the wrong values that only who reads the batches finds, such as None: a rank sends them on."""
    for account in accounts:
        yield replace(account, refused=account.refused + rejected.get(account.rank, 0))
