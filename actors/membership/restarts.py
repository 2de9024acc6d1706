"""Which ranks the launcher has started again, and whether it may do so once more."""

from __future__ import annotations

from collections.abc import Mapping

from swanlab_ray.actors.membership.members import Member, verdict
from swanlab_ray.actors.notify.messages import RESTARTED


class Restarts:
    """Kept by the writer, whose lock guards it.

    Args:
        count: times that the job was started again, as its journal tells.
    """

    def __init__(self, count: int = 0) -> None:
        self.count = count
        """Times that the job was started again."""
        self.awaited: set[int] = set()
        """Ranks that were not started again yet, since then."""
        self._again: set[int] = set()  # ranks that were, since that was told

    def note(self, earlier: Member, ranks: Mapping[int, Member]) -> str | None:
        """A rank was started again; the sentence that tells it, once for all ranks of the job."""
        if earlier.state == "success":
            return None
        number = earlier.process.rank
        if self._again and number not in self._again:
            self._again.add(number)
            return None
        self._again = {number}
        self.count += 1
        failed = {n: r for n, r in ranks.items() if r.state not in ("running", "success")}
        self.awaited = {n for n, r in ranks.items() if r.state != "success"} - {number}
        cause = verdict(failed, 0)[1] if failed else "its ranks had ended without a word"
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{RESTARTED} after {(cause or '').splitlines()[0]}{times}"

    def may_follow(self, ranks: Mapping[int, Member]) -> bool:
        """Whether the launcher has starts left, as far as ranks know."""
        return any(r.process.restarts > max(self.count, r.process.attempt) for r in ranks.values())
