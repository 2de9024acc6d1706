"""Writers that can be killed in this process: from then on nothing reaches the disk or SwanLab any more."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from swanlab_ray.actors.delivery.sink import Row, Sink
from swanlab_ray.actors.journal import writing as journal_module
from swanlab_ray.actors.journal.files import Disk
from swanlab_ray.actors.journal.reading import Damaged
from swanlab_ray.actors.journal.records import Batch
from swanlab_ray.actors.notify.messages import Notifications
from swanlab_ray.actors.runs.finding import RunFiles, find_runs
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.codec import decode_batch
from swanlab_ray.actors.wire.events import Scalars
from swanlab_ray.actors.wire.messages import Ack, Farewell, Goodbye, Hello, NumberedBatch, Sign
from swanlab_ray.actors.wire.status import WriterStatus
from swanlab_ray.actors.writer import ticker
from swanlab_ray.actors.writer.actor import Writer
from swanlab_ray.actors.writer.parts import Parts
from swanlab_ray.observer.job.identity import Identity
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.transport.link import Link as LinkProtocol
from swanlab_ray.observer.transport.link import LinkBroken, welcomed


class MortalDisk(Disk):
    """Ends the thread that uses it, once it is dead."""

    made: list[MortalDisk] = []  # noqa: RUF012 - emptied by mortal()

    def __init__(self) -> None:
        self.dead = False
        self.made.append(self)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        if self.dead:
            raise SystemExit
        return super().write(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        if self.dead:
            raise SystemExit
        super().sync(descriptor)


class NoSwanLab(Sink):
    """Takes rows and keeps them."""

    def __init__(self, notice: Callable[[str], None], on_open: Callable[[Sink], None]) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        super().__init__("offline", notice, on_open)

    def _write_some(self, first: Row) -> None:
        self.rows.append((first.step, first.values))
        self.written += len(first.values)
        self._forget(1)


def mortal(patch: pytest.MonkeyPatch, swanlab: bool = False) -> None:
    """Make the writers of this process mortal, and keep SwanLab out unless it is wanted."""
    MortalDisk.made.clear()
    patch.setattr(journal_module, "Disk", MortalDisk)
    patch.setattr("ray.is_initialized", lambda: False)
    patch.setattr(ticker, "LINGER_S", 0.0)
    if not swanlab:
        patch.setattr(Parts, "_make_sink", lambda self: NoSwanLab(self.notices, self.notes.opened))


class Cluster:
    """Where ranks find the writer of a run: what Ray is otherwise.

    It is over when its test is: whoever came then would start a writer that is not mortal, which keeps this process's
    one SwanLab client.
    """

    made: ClassVar[weakref.WeakSet[Cluster]] = weakref.WeakSet()

    def __init__(self, settings: ObserverSettings) -> None:
        self.made.add(self)
        self.settings = settings
        self._over = False
        self.writer: Writer | None = None
        self.incarnations = 0
        self._disk: MortalDisk | None = None
        self._lock = threading.Lock()

    def find(self) -> Writer:
        """The writer, started again if it was killed."""
        with self._lock:
            if self._over:
                raise LinkBroken("its test is over")
            if self.writer is None:
                self.writer = Writer(self.settings.run_id or "r", self.settings)
                self._disk = MortalDisk.made[-1]
                self.incarnations += 1
            return self.writer

    def kill(self) -> Writer | None:
        """Kill the writer; the next call to :meth:`find` starts another."""
        with self._lock:
            killed, self.writer = self.writer, None
            if killed is not None and self._disk is not None:
                self._disk.dead = True
                killed._telling.notifications = Notifications(None, print)
                killed._ticker._deserted = lambda now: True  # type: ignore[method-assign]
                killed._journal.fenced = True  # both end its clock
                killed._parts.reducer.abandon(close=False)
                killed._parts.reducer.sink.closed.wait(20)  # one process has one SwanLab client
            return killed

    def end(self) -> None:
        """Nobody finds it any more, and no writer of it goes on."""
        with self._lock:
            self._over = True
        self.kill()

    @property
    def files(self) -> RunFiles:
        (run,) = find_runs([self.settings.log_dir])
        return run


class Link:
    """A rank's connection, which can lose answers, delay them, and be cut."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.run_id = cluster.settings.run_id
        self.deadline = 0.0
        self.cut = False
        self.lose_answers = 0
        self.delay = 0.0
        self._writer: Writer | None = None

    def open(self, hello: Hello) -> Ack:
        if self.cut:
            raise LinkBroken("it is cut")
        self._writer = self.cluster.find()
        return welcomed(self._call("hello", hello))

    def ingest(self, sign: Sign, batch: NumberedBatch | None) -> Any:
        return self._call("ingest", sign, batch)

    def acknowledged(self, reference: Any, wait: float) -> Ack | None:
        if self.lose_answers:
            self.lose_answers -= 1
            raise LinkBroken("an answer is lost")
        answer: Ack | None = reference
        return answer

    def goodbye(self, goodbye: Goodbye, wait: float) -> Farewell:
        farewell: Farewell = self._call("goodbye", goodbye)
        return farewell

    def status(self, wait: float) -> WriterStatus | None:
        status: WriterStatus = self._call("status")
        return status

    def close(self, over: bool) -> None: ...

    def _call(self, method: str, *arguments: Any) -> Any:
        time.sleep(self.delay)
        if self.cut or self._writer is None or self._writer is not self.cluster.writer:
            raise LinkBroken("the writer is gone")
        try:
            return getattr(self._writer, method)(*arguments)
        except Exception as error:
            raise LinkBroken(f"{type(error).__name__}: {error}") from error


def rank(cluster: Cluster, link: LinkProtocol, number: int = 0, size: int = 1) -> Observer:
    """A rank that reports there."""
    return Observer(cluster.settings, Identity(number, size, number, 1), link)


def logged_in(run: RunFiles) -> Iterator[tuple[int, int, dict[str, float]]]:
    """``(rank, step, values)`` of every event in a run's files, each batch once."""
    seen: set[tuple[int, str, int]] = set()
    for entry in merged(run):
        assert not (isinstance(entry, Damaged) and not entry.damage.torn)
        if isinstance(entry, Batch) and (entry.rank, entry.life, entry.seq) not in seen:
            seen.add((entry.rank, entry.life, entry.seq))
            for event in decode_batch(entry.data)[0]:
                if isinstance(event, Scalars):
                    yield entry.rank, event.step, event.values


def settings_for(log_dir: Path, **values: Any) -> ObserverSettings:
    return ObserverSettings(**({"project": "p", "mode": "offline", "log_dir": log_dir, "run_id": "r"} | values))
