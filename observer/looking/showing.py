"""What ``swanlab-ray show`` prints of one run."""

from __future__ import annotations

from itertools import islice

import click
import msgspec

from swanlab_ray.actors.completions.tables import readable
from swanlab_ray.actors.journal.batches import BatchReader
from swanlab_ray.actors.runs.finding import RunFiles
from swanlab_ray.actors.wire.text import harmless, many, one_line
from swanlab_ray.observer.history import archive, transcripts
from swanlab_ray.observer.history.breakdown import breakdown, phases_table
from swanlab_ray.observer.looking.render import headline, json_text, say, shown, terminal


def show_run(run: archive.Run, as_json: bool) -> None:
    """How it ended, where every event of each rank is, what was alerted, the last values."""
    batches = BatchReader()
    values = archive.latest_values(run, batches)
    if as_json:
        latest = {name: {"step": step, "value": value} for name, (step, value) in values.items()}
        print(json_text(run.as_json(batches.rejected) | {"latest": latest}))
        return
    console = terminal()
    for line in archive.describe(run, batches.rejected):
        say(console, line)
    console.print(archive.ledger_table(run.accounts))
    for name, (step, value) in islice(values.items(), archive.SHOWN_VALUES):
        say(console, f"  {name} = {value:.6g} at step {step}")
    if len(values) > archive.SHOWN_VALUES:
        say(console, f"  and {len(values) - archive.SHOWN_VALUES} more (--json)")


def show_phases(files: RunFiles, last: int, as_json: bool) -> None:
    """The mean time of a step by phase and rank, and the rank that the others wait for."""
    found = breakdown(files, last)
    steps = found.steps
    if as_json:
        print(json_text([step.as_json() for step in steps]))
        return
    if not steps:
        raise _nothing(files, "has no spans: ObserverCallback and span() log them.")
    console = terminal()
    say(console, f"mean of {many(len(steps), 'step')}, {steps[0].step} to {steps[-1].step}")
    console.print(phases_table(steps))
    if found.straggler is not None:
        say(console, f"Straggler: {found.straggler}", "yellow")
    elif max(len(step.ranks) for step in steps) > 1:
        say(console, "No straggler.")
    if found.dropped:
        say(console, f"{found.dropped} spans of this run were dropped: they came faster than they could be sent.")


def show_completions(files: RunFiles, last: int, as_json: bool) -> None:
    """The latest rows of RLHF completions, whole."""
    rows = list(transcripts.completions(files, last))
    if as_json:
        print(json_text(rows, masking=False))
        return
    if not rows:
        raise _nothing(
            files,
            "has no completions: it logs them with DPO, KTO, ORPO, CPO, GRPO, RLOO and OnlineDPO trainers, or with "
            "log_completions().",
        )
    console = terminal()
    for row in rows:
        algorithm = f", {row['algorithm']}" if "algorithm" in row else ""
        headline(console, f"step {row['step']}, rank {row['rank']}{algorithm}")
        values = {one_line(name): value for name, value in row.items() if name not in ("step", "rank", "algorithm")}
        print(harmless(readable(list(values), list(values.values()))))


def show_stacks(files: RunFiles, as_json: bool) -> None:
    """The Python stacks of the ranks of a job that hung."""
    found = archive.stacks(files)
    if as_json:
        print(json_text([{"rank": rank} | msgspec.structs.asdict(stacks) for rank, stacks in found]))
        return
    if not found:
        raise _nothing(files, "never hung.")
    console = terminal()
    for rank, stacks in found:
        within = f", in {stacks.span}" if stacks.span else ""
        headline(console, f"rank {rank}, step {stacks.step}{within}, {archive.moment(stacks.time_ns)}")
        for thread, frames in zip(stacks.threads, stacks.frames, strict=False):
            say(console, f"{thread}:")
            for frame in frames:
                say(console, f"  {frame}")


def _nothing(files: RunFiles, what: str) -> click.ClickException:
    return click.ClickException(shown(f"Run '{files.run_id}' {what}"))
