"""The connection of a rank to its writer through the agent of this machine. Only the flusher thread uses it."""

from __future__ import annotations

import math
import time
from typing import Any, TypeVar

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.messages import Ack, Farewell, Goodbye, Hello, NumberedBatch, Sign
from swanlab_ray.actors.wire.status import WriterStatus
from swanlab_ray.observer.agent import starting
from swanlab_ray.observer.agent.frames import Frame, Ingest, Opening, Stream, decoded, encoded, told
from swanlab_ray.observer.agent.meeting import Meeting
from swanlab_ray.observer.agent.reach import Head
from swanlab_ray.observer.ray_cluster.addresses import NoCluster
from swanlab_ray.observer.transport.link import CALL_DEADLINE_S, Hopeless, LinkBroken, NotNow, RunOver

POLL_S = 0.2
"""How long one look for the answer to a hello takes; between them the agent is looked at."""

BROKEN: dict[str, type[LinkBroken]] = {kind.__name__: kind for kind in (LinkBroken, RunOver, Hopeless, NotNow)}
"""What an answer may be instead of one."""

T = TypeVar("T")


class AgentLink:
    """Finds or starts the agent, which finds or starts Ray and the writer.

    Args:
        settings: of the run.
        run_id: of the run.
        meeting: of its ranks, where they are on several machines.
    """

    def __init__(self, settings: ObserverSettings, run_id: str, meeting: Meeting) -> None:
        self._settings = settings
        self._meeting = meeting
        self._agent: starting.Agent | None = None
        self._stream: Stream | None = None
        self._calls = 0
        self._answers: dict[int, Frame] = {}
        self.run_id: str | None = run_id
        self._run_id = run_id
        self.deadline = math.inf

    def open(self, hello: Hello) -> Ack:
        self._disconnect()
        try:
            agent = self._agent = self._agent or starting.Agent(self._run_id, self._settings.dashboard)
            self._stream = Stream(agent.connect(lambda: self.deadline), CALL_DEADLINE_S)
            head = self._meeting.head(self._reach, lambda: self.deadline)
        except LinkBroken:
            raise
        except OSError as error:  # no cluster, no more descriptors, a full disk
            raise LinkBroken(str(error)) from error
        number = self._call("open", Opening(hello, self._run_id, told(self._settings), head, self._meeting.may_start))
        began = time.monotonic()
        while (answer := self._answer(number, Ack, POLL_S)) is None:
            try:
                agent.look(began if head is None else math.inf)  # another machine takes its own time
            except NoCluster as error:
                raise LinkBroken(str(error)) from error
            if time.monotonic() >= self.deadline:
                raise LinkBroken(f"The Ray cluster of this run had not started yet: see {agent.log}.")
        agent.works()
        return answer

    def _reach(self) -> Head:
        head = self._answer(self._call("reach", None), Head, CALL_DEADLINE_S)
        if head is None:
            raise LinkBroken("the agent of this machine does not answer")
        return head

    def ingest(self, sign: Sign, batch: NumberedBatch | None) -> int:
        return self._call("ingest", Ingest(sign, batch))

    def acknowledged(self, reference: Any, wait: float) -> Ack | None:
        return self._answer(reference, Ack, wait)

    def goodbye(self, goodbye: Goodbye, wait: float) -> Farewell:
        farewell = self._answer(self._call("goodbye", goodbye), Farewell, wait)
        if farewell is None:
            raise LinkBroken(f"the writer did not answer within {wait:.0f} s")
        return farewell

    def status(self, wait: float) -> WriterStatus | None:
        return self._answer(self._call("status", None), WriterStatus, wait)

    def close(self, over: bool) -> None:
        self._meeting.close()
        self._disconnect()
        if self._agent is not None:
            self._agent.leave(over)
            self._agent = None

    def _disconnect(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        self._answers.clear()

    def _call(self, what: str, body: Any) -> int:
        if self._stream is None:
            raise LinkBroken("not connected")
        self._calls += 1
        try:
            self._stream.send(encoded(self._calls, what, body))
        except OSError as error:
            raise self._gone(error) from error
        return self._calls

    def _answer(self, number: int, kind: type[T], wait: float) -> T | None:
        """The answer to a call, within so many seconds; those to others are kept."""
        if self._stream is None:
            raise LinkBroken("not connected")
        deadline = time.monotonic() + wait
        while number not in self._answers:
            try:
                frame = self._stream.receive(max(0.0, deadline - time.monotonic()))
            except (OSError, EOFError) as error:
                raise self._gone(error) from error
            if frame is None:
                return None
            self._answers[frame.number] = frame
        answer = self._answers.pop(number)
        if not answer.what:
            return decoded(answer.body, kind)
        sentence = decoded(answer.body, str)
        if answer.what == starting.UNSTARTED and self._agent is not None:
            raise LinkBroken(self._agent.failed(sentence))
        raise BROKEN.get(answer.what, LinkBroken)(sentence)

    def _gone(self, error: Exception) -> LinkBroken:
        self._disconnect()
        why = self._agent.why_gone() if self._agent is not None else str(error)
        return LinkBroken(why)
