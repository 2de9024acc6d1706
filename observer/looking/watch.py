"""Looking at runs from outside: what ``swanlab-ray status`` and the demo show."""

from __future__ import annotations

from rich.console import Group

from swanlab_ray.actors.wire.messages import ACTOR_PREFIX, NAMESPACE
from swanlab_ray.actors.wire.status import RankStatus, WriterStatus, duration, standstill, status_line
from swanlab_ray.actors.wire.text import first_line, many
from swanlab_ray.observer.looking.render import Column, Grid, cell
from swanlab_ray.observer.ray_cluster import finding as cluster

__all__ = ["Watcher", "rank_table", "status_line"]

ANSWER_S = 10.0
STANDING_S = 10.0
"""Seconds without a step that are shown."""


class Watcher:
    """A connection to the cluster of a run (or of any run), to ask writers for their status.

    Raises:
        NoCluster: there is nothing to look at.
    """

    def __init__(self, run_id: str | None = None) -> None:
        self._run_id = run_id
        cluster.join_watcher(run_id)

    def statuses(self) -> list[WriterStatus]:
        """Status of every writer here, or of the one asked for."""
        import ray

        names = [
            entry["name"]
            for entry in ray.util.list_named_actors(all_namespaces=True)
            if entry["namespace"] == NAMESPACE and entry["name"].startswith(ACTOR_PREFIX)
        ]
        if self._run_id is not None:
            names = [name for name in names if name == ACTOR_PREFIX + self._run_id]
        answers = []
        for name in sorted(names):
            status = self._ask(name)
            if status is not None:
                answers.append(status)
        return answers

    @staticmethod
    def _ask(name: str) -> WriterStatus | None:
        import ray

        try:
            status: WriterStatus = ray.get(ray.get_actor(name, NAMESPACE).status.remote(), timeout=ANSWER_S)
        except (ray.exceptions.RayError, ValueError):  # it has just ended
            return None
        return status

    def close(self) -> None:
        """Leave the cluster."""
        cluster.leave()


def rank_table(status: WriterStatus) -> Group:
    """A row per rank: where it runs, how far it is, and what became of its events."""
    grid = Grid(
        Column("rank", right=True),
        Column("host", least=8),
        Column("device", least=6),
        Column("state", least=9),
        *(Column(name, right=True) for name in ("step", "ms/step", "loss", "logged", "journal")),
        Column("dropped", right=True, least=9),
    )
    for rank in status.ranks:
        grid.add(
            str(rank.rank),
            rank.host,
            rank.gpu or "CPU",
            cell(rank.state, _COLOUR.get(rank.state, "red")) + cell(_standing(rank)),
            _of(rank.step, status.max_steps),
            "-" if rank.step_time is None else f"{rank.step_time * 1e3:.0f}",
            "-" if rank.loss is None else f"{rank.loss:.4f}",
            str(rank.logged),
            str(rank.received),
            str(rank.dropped) if not rank.spooled else f"{rank.dropped} (+{rank.spooled} spooled)",
        )
    hang = [cell(standstill(status.hang), "red")] if status.hang else []
    ledger = (
        f"{many(status.received, 'event')} in the journal, {many(status.written, 'scalar')} written to SwanLab, "
        f"lag {status.lag:.1f} s, dropped {status.dropped}"
    )
    return Group(cell(_title(status), "italic"), grid, *hang, cell(ledger))


_COLOUR = {"running": "cyan", "success": "green"}


def _standing(rank: RankStatus) -> str:
    """How long a rank has not got ahead, where that is long, and what it does."""
    if rank.state != "running" or rank.idle is None or rank.idle < STANDING_S:
        return ""
    return f" {duration(rank.idle)} {rank.span}".rstrip()


def _title(status: WriterStatus) -> str:
    error = f" - {first_line(status.error)}" if status.error else ""
    return f"{status.project} / {status.experiment or status.run_id} ({status.mode}): {status.state}{error}"


def _of(step: int | None, total: int) -> str:
    if step is None:
        return "-"
    return f"{step}/{total}" if total else str(step)
