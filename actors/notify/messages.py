"""Which notifications a run sends, and what they say. Once per job, since the writer is one whatever the world size."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from swanlab_ray.actors.notify.cards import Message, Words, same
from swanlab_ray.actors.notify.outbox import Mailbox
from swanlab_ray.actors.notify.rules import Fired
from swanlab_ray.actors.wire.status import HANGS, REPEATED, RankStatus, WriterStatus, duration, standstill

START_PATIENCE_S = 60.0
"""How long the first message waits for all ranks, and for SwanLab to say where the run is."""
GONE_GRACE_S = 20.0
"""How long a rank is gone before that is told: mostly the run ends with it, and one message is enough."""
STRAGGLER_S = 60.0
"""For how long of their steps the others must have waited for the same rank in the same phase."""
LONGEST_STEP_S = STRAGGLER_S / 2
"""What of the time to the next step counts at the most: it may have been that of an evaluation or of a checkpoint."""

RESTARTED = "The training was started again,"
MOVES_AGAIN = "Ranks make steps again"
ONLY_RANK_0 = "Only rank 0 has reported"
_TOLD_OTHERWISE = ("Lark ", "A notification ", "Alert: ", "The journal is written again.", HANGS, ONLY_RANK_0, REPEATED)
"""How notices begin that are no notification of their own."""

_ENDS = {
    "success": (Words("Training complete", "训练完成"), "green"),
    "crashed": (Words("Training failed", "训练失败"), "red"),
    "aborted": (Words("Training aborted", "训练已中止"), "grey"),
}
_START = Words("Training started", "训练开始")
_AGAIN = Words("Training goes on", "训练继续")
_RESTARTED = Words("Training restarted", "训练已重启")
_MOVES_AGAIN = Words("Training moves again", "训练已恢复")
_PROJECT = Words("Project", "项目")
_EXPERIMENT = Words("Experiment", "实验")
_STATUS = Words("Status", "状态")
_RANKS = Words("Ranks", "进程")
_NODES = Words("Nodes", "节点")
_STEP = Words("Step", "步数")
_LOSS = Words("Loss", "损失")
_RATE = Words("Learning rate", "学习率")
_LEFT = Words("Time left", "剩余时间")
_TOOK = Words("Duration", "用时")
_WHERE = Words("Where it lies", "保存位置")
_UPLOAD = Words("Upload it with", "上传命令")


@dataclass
class _Straggler:
    """The rank that the others wait for, and the phase."""

    who: str
    step: int | None
    at: float
    """When that step was seen first."""
    seconds: float = 0.0
    """Of steps in which they have waited for it."""


class Notifications:
    """Looks at the writer's status now and then, and posts what its readers should know.

    Args:
        mailbox: sends the messages; None where the run has no bot.
        notice: takes a sentence for the user.
        posted: keys of the messages that an earlier incarnation of the writer has sent.
        noticed: alerts of which it has told the ranks.
        began: when the run began, in Unix seconds; now by default.
        again: it is a run of an earlier job that goes on.
    """

    def __init__(
        self,
        mailbox: Mailbox | None,
        notice: Callable[[str], None],
        posted: Iterable[str] = (),
        noticed: Iterable[str] = (),
        began: float | None = None,
        again: bool = False,
    ) -> None:
        self._mailbox = mailbox
        self._notice = notice
        self._posted = set(posted)
        self._noticed = set(noticed)
        self._began = time.time() if began is None else began
        self._again = again
        self._seen: float | None = None
        self._pace: tuple[float, int] | None = None
        self._gone: dict[int, float] = {}  # since when, for ranks of which nobody was told
        self._told_gone: set[int] = set()
        self._losses: int | None = None
        self._straggler: _Straggler | None = None

    def look(self, status: WriterStatus, now: float) -> None:
        """See what is new; ``now`` in Unix seconds."""
        if not status.ranks:
            return
        if self._seen is None:
            self._seen = now
        if self._pace is None and status.step is not None:
            self._pace = (now, status.step)
        self._tell_start(status, now)
        if status.state == "running":
            self._tell_hang(status, now)
            self._tell_gone(status, now)
            self._tell_straggler(status, now)
        for sentence in status.notices:
            if sentence.startswith(RESTARTED):
                self._tell(f"notice {sentence}", _RESTARTED, "blue", status, now, same(sentence))
            elif sentence.startswith(MOVES_AGAIN):
                self._tell(f"notice {sentence}", _MOVES_AGAIN, "green", status, now, same(sentence))
            elif not sentence.startswith(_TOLD_OTHERWISE):
                title = Words("The observer needs attention", "观测器需要关注")
                self._tell(f"notice {sentence}", title, "orange", status, now, same(sentence))
        losses = status.dropped - status.killed
        if self._losses is None:
            self._losses = losses  # of earlier jobs of this run
        if losses > self._losses:
            text = Words(
                "Ranks had to drop events: the writer or its disk cannot keep up, or was away for too long.",
                "部分数据被丢弃：写入进程或磁盘跟不上，或离线过久。",
            )
            title = Words("The observer has lost data", "观测数据丢失")
            self._tell("dropped", title, "orange", status, now, text)

    def fire(self, fired: Fired, status: WriterStatus, now: float) -> None:
        """A rule on metrics has come true."""
        found = f"{fired.value:.6g} at step {fired.step}" + ("" if fired.rank is None else f" on rank {fired.rank}")
        sentence = f"Alert: {fired.rule} ({found})"
        if sentence not in self._noticed:
            self._noticed.add(sentence)
            self._notice(sentence)
        title = Words(f"Alert: {fired.rule}", f"指标提醒：{fired.rule}")
        whose = "" if fired.rank is None else f"（进程 {fired.rank}）"
        text = Words(f"It is {found}.", f"第 {fired.step} 步的值为 {fired.value:.6g}{whose}。")
        self._tell(sentence, title, "orange", status, now, text, topic=fired.rule)

    def end(self, status: WriterStatus, now: float, timeout: float) -> int:
        """The run has ended. Waits so many seconds for what is on its way; how many messages are left over then."""
        if self._mailbox is None:
            return 0
        self._tell_start(status, now, at_last=True)
        title, color = _ENDS[status.state]
        headline, _, trace = (status.error or "").partition("\n")
        self._tell("end", title, color, status, now, same(headline) if headline else None, trace)
        return self._mailbox.close(timeout)

    def _tell_start(self, status: WriterStatus, now: float, at_last: bool = False) -> None:
        ready = len(status.ranks) >= status.world_size and (status.url or status.run_dir)
        if ready or at_last or (self._seen is not None and now - self._seen > START_PATIENCE_S):
            self._tell("start", _AGAIN if self._again else _START, "blue", status, now)

    def _tell_hang(self, status: WriterStatus, now: float) -> None:
        """No rank gets ahead."""
        hang = status.hang
        if hang is None:
            return
        self._tell_start(status, now, at_last=True)
        text = Words(standstill(hang), f"已有 {duration(hang.seconds)} 没有任何进程前进。{hang.text}")
        title = Words("Training hangs", "训练卡住")
        self._tell(f"hang {hang.number}", title, "red", status, now, text, hang.stacks)

    def _tell_gone(self, status: WriterStatus, now: float) -> None:
        """Ranks that were lost, or have failed, while others go on."""
        back: list[RankStatus] = []
        for rank in status.ranks:
            if rank.state in ("running", "success"):
                self._gone.pop(rank.rank, None)
                if rank.rank in self._told_gone:
                    self._told_gone.discard(rank.rank)
                    self._posted = {key for key in self._posted if not key.startswith("gone ")}
                    back.append(rank)
            else:
                self._gone.setdefault(rank.rank, now)
        if back:
            who = ", ".join(f"{rank.rank} ({rank.host}, pid {rank.pid})" for rank in back[:8])
            key = f"back {who} {now:.0f}"
            text = Words(f"Rank {who} is there again.", f"进程 {who} 已恢复。")
            self._tell(key, Words("Ranks are back", "进程已恢复"), "green", status, now, text)
        if status.hang is not None or not any(rank.state == "running" for rank in status.ranks):
            return  # of which that is a part; or all are gone, and the run ends or is started again
        new = [
            rank
            for rank in status.ranks
            if rank.rank not in self._told_gone and now - self._gone.get(rank.rank, now) > GONE_GRACE_S
        ]
        if not new:
            return
        self._told_gone |= {rank.rank for rank in new}
        running = sum(rank.state == "running" for rank in status.ranks)
        first = "; ".join(f"{rank.rank} ({rank.host}, pid {rank.pid}): {_why(rank)}" for rank in new[:8])
        more = len(new) - 8
        others = f"{running} {'others are' if running > 1 else 'other is'} running."
        text = Words(
            f"Rank {first}{f'; and {more} more' if more > 0 else ''}. {others}",
            f"进程 {first}{f' 等 {len(new)} 个' if more > 0 else ''}。其他 {running} 个进程仍在运行。",
        )
        title = Words("Ranks are gone", "有进程退出")
        self._tell(f"gone {first}", title, "red", status, now, text)

    def _tell_straggler(self, status: WriterStatus, now: float) -> None:
        who = (status.straggler or "").partition(" (")[0]  # without its share, which changes all the time
        known = self._straggler
        if not who:
            self._straggler = None
        elif known is None or known.who != who:
            self._straggler = _Straggler(who, status.step, now)
        elif status.step != known.step:  # until then nothing says that they still wait
            known.seconds += min(now - known.at, LONGEST_STEP_S)
            known.step, known.at = status.step, now
        if self._straggler is not None and self._straggler.seconds > STRAGGLER_S:
            text = Words(
                f"The other ranks have been waiting for {status.straggler} for {duration(STRAGGLER_S)}.",
                f"其他进程一直在等待 {status.straggler}，已达 {duration(STRAGGLER_S)}。",
            )
            title = Words("One rank slows down the others", "有进程拖慢整体速度")
            self._tell(f"straggler {who}", title, "orange", status, now, text)

    def _tell(
        self,
        key: str,
        title: Words,
        color: str,
        status: WriterStatus,
        now: float,
        text: Words | None = None,
        code: str = "",
        topic: str = "",
    ) -> None:
        if key in self._posted or self._mailbox is None:
            return
        self._posted.add(key)
        message = Message(
            key=key,
            topic=topic or key,
            title=Words(*(f"{words} · {status.experiment or status.run_id}" for words in title)),
            color=color,
            facts=self._facts(status, now),
            text=text,
            code=code,
            link=status.url,
            footer=f"SwanLab · swanlab-ray · {status.run_id}",
        )
        self._mailbox.post(message)

    def _facts(self, status: WriterStatus, now: float) -> list[tuple[Words, str]]:
        running = sum(rank.state == "running" for rank in status.ranks)
        ended = status.state != "running"
        facts = [
            (_PROJECT, status.project),
            (_EXPERIMENT, status.experiment or status.run_id),
            (_STATUS, status.state),
            (_RANKS, str(status.world_size) if ended else f"{running}/{status.world_size}"),
            (_NODES, str(len({rank.host for rank in status.ranks}))),
        ]
        if status.step is not None:
            facts.append((_STEP, f"{status.step}/{status.max_steps}" if status.max_steps else str(status.step)))
        if status.loss is not None:
            facts.append((_LOSS, f"{status.loss:.4g}"))
        if status.learning_rate is not None:
            facts.append((_RATE, f"{status.learning_rate:.3g}"))
        left = None if ended else self._time_left(status, now)
        if left is not None:
            facts.append((_LEFT, duration(left)))
        if now - self._began >= 1:
            facts.append((_TOOK, duration(now - self._began)))
        if not status.url:
            facts.append((_WHERE, status.run_dir or status.journal))
            if status.mode != "local":
                facts.append((_UPLOAD, f"swanlab-ray sync {shlex.quote(status.journal)}"))
        return facts

    def _time_left(self, status: WriterStatus, now: float) -> float | None:
        """Seconds, at the pace since this was first looked at."""
        if self._pace is None or status.step is None or not self._pace[1] < status.step < status.max_steps:
            return None
        since, step = self._pace
        return (status.max_steps - status.step) * (now - since) / (status.step - step)


def _why(rank: RankStatus) -> str:
    return (rank.error or rank.state).partition("\n")[0]
