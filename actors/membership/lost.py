"""Ranks that went without a word: their process is gone, or they are not heard any more."""

from __future__ import annotations

from swanlab_ray.actors.health.hangs import why_silent
from swanlab_ray.actors.log import log
from swanlab_ray.actors.membership.clocks import RunClock
from swanlab_ray.actors.membership.members import Member
from swanlab_ray.actors.membership.membership import Membership
from swanlab_ray.actors.wire.messages import BEAT_S

GONE_S = 1.0
"""What a rank had sent may still be on its way to the disk when its process was seen to end."""
FAILED_RANK_GRACE_S = 15.0
"""Once one rank has failed, silence this long means that its peers went with it."""


def notice_lost(members: Membership, timeout: float, clock: RunClock, now: float, behind: float) -> None:
    """Find them, and note how they ended. The members' lock is held.

    Args:
        members: of the run.
        timeout: seconds of silence that are too many.
        clock: of the run.
        now: monotonic.
        behind: seconds that what a rank has sent may still be on its way here; it may say how the rank ended.
    """
    if any(member.state not in ("running", "success") for member in members.ranks.values()):
        timeout = min(timeout, FAILED_RANK_GRACE_S)
    for member in members.ranks.values():
        if member.state != "running":
            continue
        silent = now - member.heard
        gone = (member.gone and silent > GONE_S) or (silent > 2 * BEAT_S and members.processes.gone(member))
        if (gone or silent > timeout) and behind < silent:
            why = "its process is gone (killed?)" if gone else _silence(members, member, timeout)
            # It was heard every BEAT_S at least, so it fell about then; its peers' errors came of it.
            member.lose(why, clock.now_ns() - int((silent - BEAT_S / 2) * 1e9))
            member.heed_outcome()
            log(f"rank {member.process.rank} is gone: {member.state}{' - ' + member.error if member.error else ''}")
            members.note_end(member)


def _silence(members: Membership, member: Member, timeout: float) -> str:
    state = members.processes.state(member)
    return f"no sign of life for {timeout:.0f} s" + (f": {why_silent(state)}" if state else "")
