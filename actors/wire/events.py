"""What a rank tells: events.

Each is encoded once, on the thread that logs it, and stays as these bytes until the writer reads it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

State = Literal["success", "crashed", "aborted"]
"""How a rank, and a run, can end: the words SwanLab uses."""

# Whose value a scalar is, and so what the writer makes of it over ranks.
JOB = 0
"""Already reduced over ranks (Trainer logs): written under its own name."""
USER = 1
"""Logged by the user's code: its own name, and the view over ranks where several ranks log it."""
RANK = 2
"""A rank's own measurement (its loss, its step time): only the view over ranks."""

SCALARS, CONFIG, PROGRESS, OUTCOME, COMPLETIONS, TOKENIZER, SPANS, STACKS = range(8)
KINDS = ("scalars", "config", "progress", "outcome", "completions", "tokenizer", "spans", "stacks")

Step = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
"""What SwanLab can hold."""


def _check(columns_fit: bool) -> None:
    """Part of decoding an event that another version, or a damaged memory, has written."""
    if not columns_fit:
        raise ValueError("its columns do not fit together")


class Scalars(msgspec.Struct, array_like=True, tag=SCALARS, frozen=True, gc=False):
    """One ``log()`` call. ``time_ns`` is Unix time in nanoseconds, ``values`` is flat."""

    step: Step
    time_ns: int
    scope: int
    values: dict[str, float]


class Config(msgspec.Struct, array_like=True, tag=CONFIG, frozen=True):
    """Configuration of the run, nested as the user gave it, without secrets."""

    values: dict[str, Any]


class Progress(msgspec.Struct, array_like=True, tag=PROGRESS, frozen=True):
    """How far a rank is. ``max_steps`` is 0 where it is not known."""

    step: int
    max_steps: int
    epoch: float | None = None


class Outcome(msgspec.Struct, array_like=True, tag=OUTCOME, frozen=True):
    """How this rank has ended should it never be heard of again; ``None``: it is at work.

    Ray Train ends a worker without running its exit handlers, so a training that is over says so at once.
    """

    state: State | None
    error: str | None
    time_ns: int


Cell = None | bool | int | float | str | bytes
"""A value of a row of completions; bytes are token ids, little-endian 32-bit integers."""


class Completions(msgspec.Struct, array_like=True, tag=COMPLETIONS, frozen=True):
    """Rows of what a model was shown or has said, as columns of one length."""

    step: Step
    time_ns: int
    algorithm: str
    """``dpo``, ``grpo``, ...; empty for rows of the user's own."""
    tokenizer: str
    """Name of the :class:`Tokenizer` of the token ids; empty where there are none."""
    left_out: int
    """Rows of this rank's batch that do not fit the table's bound, and were not sent."""
    columns: dict[str, list[Any]]
    """Of :data:`Cell`; msgspec has no union of text and bytes."""

    def __post_init__(self) -> None:
        _check(len(set(map(len, self.columns.values()))) <= 1)

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(next(iter(self.columns.values()), []))


class Tokenizer(msgspec.Struct, array_like=True, tag=TOKENIZER, frozen=True):
    """What makes text of token ids, as the ``tokenizers`` library writes it (JSON)."""

    name: str
    definition: bytes


class Spans(msgspec.Struct, array_like=True, tag=SPANS, frozen=True):
    """What a rank was doing when: spans that have ended, in the order of their ends, as columns of one length.

    Times are in nanoseconds, by the clock of the rank's host.
    """

    time_ns: int
    """Unix time at which this was put together, just before it was sent."""
    begin_ns: int
    """Unix time from which :attr:`begins` count."""
    dropped: int
    """Spans that found no room since the last event."""
    names: list[str]
    threads: list[str]
    """The first is the thread that trains."""
    thread: list[int]
    """Index into :attr:`threads`."""
    name: list[int]
    """Index into :attr:`names`."""
    step: list[int]
    begins: list[int]
    durations: list[int]
    parents: list[int]
    """Of a span in an asyncio task, how much earlier the one around it has begun; -1 where there is none. 0 for a span
    in no task, which nests by its times; empty where all are such."""
    gpu: list[int]
    """Time between CUDA events at begin and end; -1 where that was not measured, empty where nothing was."""

    def __post_init__(self) -> None:
        count = len(self.name)
        _check(all(len(column) == count for column in (self.thread, self.step, self.begins, self.durations)))
        _check(all(len(column) in (0, count) for column in (self.parents, self.gpu)))
        for column, names in ((self.thread, self.threads), (self.name, self.names)):
            _check(not column or (min(column) >= 0 and max(column) < len(names)))


class Stacks(msgspec.Struct, array_like=True, tag=STACKS, frozen=True):
    """Where the threads of a rank stand, while the job does not get ahead."""

    time_ns: int
    step: int | None
    span: str
    """As in :class:`swanlab_ray.actors.wire.messages.Doing`."""
    busy: bool | None
    """The thread that trains is on a CPU, and does not wait; None where that cannot be seen."""
    threads: list[str]
    """Their names; the first is the thread that trains."""
    frames: list[list[str]]
    """Of each thread, such as ``/job/train.py:88 in load``, the innermost first."""

    def __post_init__(self) -> None:
        _check(len(self.threads) == len(self.frames))


Event = Scalars | Config | Progress | Outcome | Completions | Tokenizer | Spans | Stacks
