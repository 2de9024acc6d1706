"""A connection of a rank that fails when it is told to."""

from __future__ import annotations

from typing import Any

from swanlab_ray.actors.wire.codec import decode_batch
from swanlab_ray.actors.wire.events import Scalars
from swanlab_ray.actors.wire.messages import Ack, Farewell, Goodbye, Hello, NumberedBatch, Sign
from swanlab_ray.actors.wire.status import WriterStatus
from swanlab_ray.observer.transport.link import LinkBroken


class ShakyLink:
    """Takes batches like the writer does, and fails when told to."""

    run_id: str | None = "shaky"
    deadline = 0.0

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.next_seq = 0
        self.down = False
        self.mute = False
        self.full = False
        self.lose_acks = 0
        self.hellos: list[Hello] = []
        self.signs: list[tuple[Sign, bool]] = []
        """Each with whether a batch came with it."""
        self.goodbyes: list[Goodbye] = []

    def open(self, hello: Hello) -> Ack:
        if self.down:
            raise LinkBroken("it is down")
        self.hellos.append(hello)
        self.next_seq = max(self.next_seq, hello.next_seq)
        return self.ack()

    def ack(self) -> Ack:
        return Ack(self.next_seq, self.next_seq, 0.01, [])

    def ingest(self, sign: Sign, batch: NumberedBatch | None) -> Any:
        if self.down:
            raise LinkBroken("it is down")
        self.signs.append((sign, batch is not None))
        if batch is not None and batch.seq == self.next_seq and not self.full:
            self.next_seq += 1
            self.taken += decode_batch(batch.data)[0]
        return self.ack()

    def acknowledged(self, reference: Any, wait: float) -> Ack | None:
        if self.lose_acks:
            self.lose_acks -= 1
            raise LinkBroken("the ack is lost")
        return None if self.mute else reference

    def goodbye(self, goodbye: Goodbye, wait: float) -> Farewell:
        self.goodbyes.append(goodbye)
        return Farewell(True, [])

    def status(self, wait: float) -> WriterStatus | None:
        return None

    def close(self, over: bool) -> None: ...

    def steps(self) -> list[int]:
        return [event.step for event in self.taken if isinstance(event, Scalars)]
