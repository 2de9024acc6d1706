"""Whether the job gets ahead: from the signs of life of its ranks, how long none of them has, and who is behind.

Ranks that train together meet in collectives, so one that stands still soon makes all of them stand still. How long is
too long follows from the job's own pauses. Then the ranks are asked for their stacks, and who is behind is told by what
its peers wait in and it does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from swanlab_ray.actors.membership.members import Member
from swanlab_ray.actors.wire.events import Stacks
from swanlab_ray.actors.wire.messages import BEAT_S, Doing, Process
from swanlab_ray.actors.wire.status import Hang

LONG_PHASES = ("evaluate", "checkpoint")
LONG = 6
"""The first steps, evaluations and checkpoints may take this many times as long as others."""
FIRST_STEPS = 3
"""Steps of a rank that count as its first."""
PAUSES = 2
"""No pause is too long that is at most this many times as long as one that has ended well."""
JITTER_S = 0.5
"""Signs of life may take so much longer one time than another."""
SILENT_S = 3 * BEAT_S
"""A rank that is not heard for so long is told apart from one that only stands still."""
STACKS_S = 10.0
"""How long the ranks' stacks are waited for."""
COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", "in _engine_run_backward", "in Join.")
"""What is found in the frames of a rank that waits for its peers; in the backward pass they meet too."""
LIBRARIES = ("/site-packages/", "/dist-packages/", "/lib/python3", "<frozen ")
NAMED = 4
"""Ranks, and places, that are told one by one."""
TOLD = 12
"""Frames of a stack that are told of a rank that is behind."""


@dataclass(slots=True)
class _Rank:
    """What is known of one life of a rank."""

    life: str
    doing: Doing
    at: float
    """When it said so, monotonic."""
    since: float
    """Since when it should get ahead, monotonic."""
    steps: int = 0
    """Times its step was seen to change, from the first one on."""
    stacks: Stacks | None = None

    def idle(self, now: float) -> float:
        return min(self.doing.idle + now - self.at, now - self.since)

    @property
    def phase(self) -> str:
        """What the length of its pauses goes by."""
        if self.steps < FIRST_STEPS:
            return "first"
        return next((name for name in self.doing.span.split(" > ") if name in LONG_PHASES), "step")


@dataclass(slots=True)
class _Found:
    """A hang that is going on."""

    number: int
    since: float
    """Monotonic: when the last rank stopped."""
    asked: float
    lives: set[str]
    """Of the ranks that do not get ahead."""
    told: Hang | None = None


@dataclass(frozen=True)
class Over:
    """A hang that was told is over."""

    seconds: float
    """How long no rank got ahead."""


class Health:
    """Kept by the writer, whose lock guards it.

    Args:
        timeout: seconds without a step that are too many; 0: never.
        state_of: the state of a rank's process as Linux names it (``R``, ``S``, ``T``, ...), where that can be seen.
    """

    def __init__(self, timeout: float, state_of: Callable[[Member], str | None] = lambda member: None) -> None:
        self._timeout = timeout
        self._state_of = state_of
        self._ranks: dict[int, _Rank] = {}
        self._pauses: dict[str, float] = {}  # the longest that have ended well, by phase
        self._hang: _Found | None = None
        self._number = 0

    @property
    def asks(self) -> int:
        """The number with which ranks are asked for their stacks; 0 while they are not."""
        return self._hang.number if self._hang else 0

    @property
    def hang(self) -> Hang | None:
        """The hang that was told and is going on."""
        return self._hang.told if self._hang else None

    def doing(self, process: Process, now: float) -> Doing | None:
        """What a rank does now, as far as it said."""
        known = self._ranks.get(process.rank)
        if known is None or known.life != process.life:
            return None
        return Doing(known.doing.step, known.doing.span, known.idle(now))

    def beat(self, rank: int, life: str, doing: Doing, now: float) -> None:
        """A rank says what it does; ``now`` is monotonic."""
        known = self._ranks.get(rank)
        if known is None or known.life != life:
            self._ranks[rank] = _Rank(life, doing, now, now - doing.idle)
            return
        pause = known.idle(now) - doing.idle
        if pause > JITTER_S and now - known.at < SILENT_S:  # it got ahead in between, and was heard all the time
            for phase in {known.phase, "step"} if known.phase == "first" and known.steps else {known.phase}:
                self._pauses[phase] = max(self._pauses.get(phase, 0.0), pause)
        if doing.step != known.doing.step and known.doing.step is not None:
            known.steps += 1
        known.doing, known.at = doing, now

    def take(self, rank: int, life: str, stacks: Stacks) -> None:
        """A rank says where it stands."""
        known = self._ranks.get(rank)
        if known is not None and known.life == life:
            known.stacks = stacks

    def paused(self, seconds: float, now: float) -> None:
        """This process stood still, and could hear nobody."""
        for known in self._ranks.values():
            known.at = min(known.at + seconds, now)

    def limit(self, phase: str) -> float:
        """Seconds that a pause in a phase may take."""
        ordinary = self._timeout if phase == "step" else LONG * self._timeout
        return max(ordinary, PAUSES * self._pauses.get(phase, 0.0))

    def look(self, members: Iterable[Member], now: float, unix: float) -> Over | None:
        """See how it stands, now and then; ``now`` is monotonic, ``unix`` the Unix time. Returns what is over."""
        members = list(members)
        watched = self._watched(members, now)
        stuck = bool(watched) and all(known.idle(now) > self.limit(known.phase) for known in watched.values())
        hang = self._hang
        if not stuck:
            self._hang = None
            if hang is None or hang.told is None:
                return None
            moved = [now - known.idle(now) for known in watched.values() if known.life in hang.lives]
            return Over(max(moved) - hang.since) if moved and max(moved) > hang.asked else None
        if hang is None:
            if any(member.state in ("lost", "crashed") for member in members):
                return None  # of that they were told already, and it is why
            since = now - min(known.idle(now) for known in watched.values())
            self._number = max(int(unix), self._number + 1)  # it rises whatever is done to the clock
            self._hang = hang = _Found(self._number, since, now, {known.life for known in watched.values()})
            for known in self._ranks.values():
                known.stacks = None
        if hang.told is None:
            answered = all(known.stacks is not None or now - known.at > SILENT_S for known in watched.values())
            if answered or now - hang.asked > STACKS_S:
                hang.told = self._told(hang, members, watched, now)
        return None

    def _watched(self, members: Sequence[Member], now: float) -> dict[int, _Rank]:
        """The ranks that should get ahead."""
        if not self._timeout:
            return {}
        training: dict[int, _Rank] = {}
        for member in members:
            known = self._ranks.get(member.process.rank)
            if known is None or known.life != member.process.life:
                continue
            if member.state == "running" and not _over(member):
                if _may_idle(member, known.doing):
                    known.since = now
                else:
                    training[member.process.rank] = known
            else:  # what it may still do, another training perhaps, begins anew
                known.since, known.steps = now, 0
        # Where only some ranks say what step they are at, the others cannot be judged.
        stepping = {rank: known for rank, known in training.items() if known.steps >= FIRST_STEPS}
        return stepping or training

    def _told(self, hang: _Found, members: Sequence[Member], watched: dict[int, _Rank], now: float) -> Hang:
        by_rank = {member.process.rank: member for member in members}
        silent = [rank for rank, known in watched.items() if now - known.at > SILENT_S]
        stacks = {rank: known.stacks for rank, known in watched.items() if known.stacks and rank not in silent}
        behind = silent or _behind({rank: known.doing.step for rank, known in watched.items()}, stacks)
        if not behind and len(watched) == 1 < len(members):  # the others have ended, and may be what it waits for
            behind = [rank for rank, found in stacks.items() if found.frames and not _meets(found.frames[0])]
        sentences = [self._silence(by_rank[rank]) for rank in silent[:NAMED]]
        for rank in [] if silent else behind[:NAMED]:
            process, doing = by_rank[rank].process, watched[rank].doing
            sentences.append(
                f"Rank {rank} ({process.host}, pid {process.pid}) is behind: {_stands(doing, stacks.get(rank))}."
            )
        if len(behind) > NAMED:
            sentences.append(f"So are {len(behind) - NAMED} more ranks.")
        ended = [member for member in members if member.state in ("success", "aborted")]
        sentences += [f"Rank {member.process.rank} has ended ({member.state})." for member in ended[:NAMED]]
        over = [member for member in members if member.state == "running" and _over(member)]
        sentences += [f"The training of rank {member.process.rank} is over." for member in over[:NAMED]]
        places: dict[str, list[int]] = {}
        for rank, known in watched.items():
            if rank not in behind:
                places.setdefault(_stands(known.doing, stacks.get(rank)), []).append(rank)
        for place, ranks in sorted(places.items(), key=lambda found: -len(found[1]))[:NAMED]:
            who = "All ranks" if len(ranks) == len(members) else _ranks(ranks)
            sentences.append(f"{who} {'waits' if who.startswith('Rank ') else 'wait'}: {place}.")
        waiting = [rank for rank in stacks if rank not in behind]
        shown = [_shown(rank, stacks[rank]) for rank in [*[r for r in behind if r in stacks][:2], *waiting[:1]]]
        return Hang(number=hang.number, seconds=now - hang.since, text=" ".join(sentences), stacks="\n\n".join(shown))

    def _silence(self, member: Member) -> str:
        process = member.process
        why = why_silent(self._state_of(member))
        return f"Rank {process.rank} ({process.host}, pid {process.pid}) gives no sign of life: {why}."


def why_silent(state: str | None) -> str:
    """Why a rank may be silent whose process is in that state, as Linux names it; None where that cannot be seen."""
    match state:
        case "T" | "t":
            return "its process is stopped (SIGSTOP, or a debugger)"
        case "D":
            return "its process waits for a disk or a driver"
        case None:
            return "its process or its machine may be gone"
    return "its process lives, but perhaps lets no other thread run"


def _over(member: Member) -> bool:
    """Whether its training is over, though its process lives."""
    return member.view.outcome is not None and member.view.outcome.state is not None


def _may_idle(member: Member, doing: Doing) -> bool:
    """Whether nothing says that it is at work: one process of its own, such as a notebook, that has no span open and in
    which no Trainer trains. Perhaps its user is thinking."""
    trains = member.view.outcome is not None and member.view.outcome.state is None
    return member.process.world_size == 1 and not doing.span and not trains


def _behind(steps: dict[int, int | None], stacks: dict[int, Stacks]) -> list[int]:
    """The ranks that the others wait for; none where that cannot be told."""
    frames = {rank: found.frames[0] if found.frames else [] for rank, found in stacks.items()}
    meeting = {rank for rank, own in frames.items() if _meets(own)}
    if len(frames) / 2 <= len(meeting) < len(frames):
        return sorted(frames.keys() - meeting)
    known = {rank: step for rank, step in steps.items() if step is not None}
    if known and min(known.values()) < max(known.values()):
        return sorted(rank for rank, step in known.items() if step == min(known.values()))
    places = Counter(own[0] for own in frames.values() if own)
    if len(places) > 1 and places.most_common(1)[0][1] > len(frames) / 2:
        return sorted(rank for rank, own in frames.items() if own and own[0] != places.most_common(1)[0][0])
    busy = [rank for rank, found in stacks.items() if found.busy]
    seen = all(found.busy is not None for found in stacks.values())
    return sorted(busy) if seen and len(busy) < len(stacks) else []


def _meets(frames: list[str]) -> bool:
    """Whether a rank waits for its peers, by what its own code has called."""
    for frame in frames:
        if any(mark in frame for mark in COLLECTIVES):
            return True
        if not any(mark in frame for mark in LIBRARIES):
            break
    return False


def _stands(doing: Doing, stacks: Stacks | None) -> str:
    """Such as ``step 41, in data, at app/train.py:88 in load``."""
    parts = ["no step yet" if doing.step is None else f"step {doing.step}"]
    if doing.span:
        parts.append(f"in {doing.span}")
    if stacks is not None and stacks.frames and stacks.frames[0]:
        frames = stacks.frames[0]
        own = next((frame for frame in frames if not any(mark in frame for mark in LIBRARIES)), None)
        place = f"at {_short(own or frames[0])}"
        parts.append(place if own in (None, frames[0]) else f"{place} ({_short(frames[0])})")
    return ", ".join(parts)


def _short(frame: str) -> str:
    """A frame with the last two parts of its file's path."""
    path, _, rest = frame.rpartition(":")
    return f"{'/'.join(path.split('/')[-2:])}:{rest}"


def _shown(rank: int, stacks: Stacks) -> str:
    frames = stacks.frames[0] if stacks.frames else []
    return "\n".join([f"rank {rank}, innermost first:", *(f"  {_short(frame)}" for frame in frames[:TOLD])])


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"Rank {ranks[0]}"
    more = f" and {len(ranks) - 2 * NAMED} more" if len(ranks) > 2 * NAMED else ""
    return f"Ranks {', '.join(map(str, sorted(ranks)[: 2 * NAMED]))}{more}"
