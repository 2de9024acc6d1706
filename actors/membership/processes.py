"""Whether the processes of ranks still exist, where the writer's own machine and container can tell."""

from __future__ import annotations

from swanlab_ray.actors.membership.members import Member
from swanlab_ray.actors.wire.locks import pid_namespace


class Processes:
    """Those that this process can see."""

    def __init__(self) -> None:
        self._namespace = pid_namespace()

    def state(self, member: Member) -> str | None:
        """As Linux names it (``R``, ``S``, ``T``, ...); None where it cannot be seen, or is gone."""
        if member.process.pid_namespace != self._namespace:
            return None
        try:
            with open(f"/proc/{member.process.pid}/stat") as stat:
                return stat.read().rpartition(")")[2].split()[0]
        except OSError:
            return None

    def gone(self, member: Member) -> bool:
        """Whether it is known not to exist any more."""
        return member.process.pid_namespace == self._namespace and self.state(member) in (None, "Z", "X")
