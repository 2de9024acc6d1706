"""Rows of completions on their way to a table, and what a table becomes: bounds, fairness among ranks, limits."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pytest

from swanlab_ray.actors.completions import tables
from swanlab_ray.actors.completions.buffers import JOIN_PATIENCE_S, PATIENCE_S, CompletionBuffer, CompletionRow
from swanlab_ray.actors.completions.tables import (
    MEDIA_BYTES,
    MEDIA_ITEMS,
    Decoder,
    Table,
    as_charts,
    as_texts,
    readable,
    table,
)
from swanlab_ray.actors.delivery.sink import QUEUE_BYTES, Sink
from swanlab_ray.actors.wire.events import Completions, Tokenizer
from tests.conftest import wait_until


class Buffer:
    """A buffer, and the tables that came out of it."""

    def __init__(self, size: int, interval: int, ranks: int = 1) -> None:
        self.tables: list[list[CompletionRow]] = []
        self.at: list[int] = []
        self.buffer = CompletionBuffer(size, interval, self._emit)
        self.buffer.set_ranks(set(range(ranks)), missing=0)
        self.now = 0.1

    def _emit(self, step: int, rows: list[CompletionRow]) -> None:
        self.at.append(step)
        self.tables.append(rows)

    def add(self, rank: int, step: int, rows: int = 1, left_out: int = 0) -> None:
        values = [f"{rank}.{step}.{number}" for number in range(rows)]
        self.buffer.add(rank, Completions(step, step, "", "", left_out, {"text": values}), self.now)

    def steps(self) -> list[list[tuple[int, int]]]:
        return [[(row.step, row.rank) for row in rows] for rows in self.tables]


def test_a_table_waits_until_every_rank_has_come_that_far() -> None:
    made = Buffer(100, interval=10, ranks=2)
    made.add(0, 1)
    made.buffer.passed(0, 1)
    made.buffer.tick(1.0)
    assert made.tables == []
    made.add(1, 1)
    made.buffer.passed(1, 1)
    made.buffer.tick(1.2)
    assert made.steps() == [[(1, 0), (1, 1)]]


def test_tables_come_every_interval_and_at_the_end() -> None:
    made = Buffer(100, interval=10)
    for step in range(1, 26):
        made.add(0, step)
        made.buffer.passed(0, step)
        made.buffer.tick(float(step))
    made.buffer.flush()
    assert [[step for step, _ in rows] for rows in made.steps()] == [
        [1],
        [*range(2, 12)],
        [*range(12, 22)],
        [22, 23, 24, 25],
    ]
    assert made.buffer.dropped == 0
    assert made.buffer.taken == 25


@pytest.mark.parametrize("ended", [False, True])
def test_tables_that_become_due_at_once_stay_apart(ended: bool) -> None:
    made = Buffer(100, interval=10)
    for step in (1, 11, 21, 22):
        made.add(0, step)
    if not ended:
        made.buffer.passed(0, 22)
        made.buffer.tick(1.0)
        assert made.steps() == [[(1, 0)], [(11, 0)], [(21, 0)]]
    made.buffer.flush()
    assert made.steps() == [[(1, 0)], [(11, 0)], [(21, 0)], [(22, 0)]]


def test_a_silent_rank_does_not_hold_a_table_up() -> None:
    made = Buffer(100, interval=1, ranks=2)
    made.add(0, 1)
    made.buffer.tick(PATIENCE_S / 2)
    assert made.tables == []
    made.buffer.tick(PATIENCE_S + 1)
    assert made.steps() == [[(1, 0)]]


def test_a_rank_that_is_still_on_its_way_is_waited_for_longer() -> None:
    made = Buffer(100, interval=1)
    made.buffer.set_ranks({1}, missing=1)
    made.add(1, 1)
    made.buffer.passed(1, 1)
    made.buffer.tick(PATIENCE_S + 1)
    assert made.tables == []
    made.buffer.tick(JOIN_PATIENCE_S + 1)
    assert made.steps() == [[(1, 1)]]


def test_the_bound_takes_from_the_rank_that_has_most_and_is_counted() -> None:
    made = Buffer(8, interval=1, ranks=3)
    made.add(0, 1, rows=20, left_out=5)
    made.add(1, 1, rows=1)
    made.add(2, 1, rows=3)
    made.buffer.flush()
    (rows,) = made.tables
    assert sorted(row.rank for row in rows) == [0, 0, 0, 0, 1, 2, 2, 2]
    assert [row.cells["text"] for row in rows if row.rank == 0] == [f"0.1.{n}" for n in range(16, 20)]  # the latest
    assert made.buffer.dropped == 5 + 24 - 8


def test_a_due_table_goes_before_later_rows_push_it_out() -> None:
    made = Buffer(8, interval=1, ranks=2)
    for step in range(1, 5):
        made.add(0, step, rows=4)
        made.add(1, step, rows=4)
    made.buffer.flush()
    assert sum(len(rows) for rows in made.tables) == 32
    assert made.buffer.dropped == 0


def test_rows_that_come_after_their_table_get_one_of_their_own() -> None:
    """SwanLab keeps the first table of a step."""
    made = Buffer(100, interval=10, ranks=2)
    made.add(0, 5)
    made.buffer.tick(PATIENCE_S + 1)
    made.add(1, 5)
    made.buffer.flush()
    assert made.steps() == [[(5, 0)], [(5, 1)]]
    assert made.at == [5, 6]


def test_a_late_row_never_gets_the_step_of_a_table_that_was_there() -> None:
    """SwanLab keeps the first table of a step. A training that went back may write its own anew, and no earlier one."""
    made = Buffer(100, interval=1, ranks=2)
    for step in range(1, 11):
        for number in range(2):
            made.add(number, step)
            made.buffer.passed(number, step)
        made.buffer.tick(float(step))
    assert made.at == list(range(1, 11))
    made.buffer.rewind(0, 5)
    made.add(1, 3)
    made.buffer.flush()
    assert made.at == [*range(1, 11), 5]
    assert made.steps()[-1] == [(3, 1)]


def test_patience_begins_when_a_row_comes_or_the_table_before_it_is_gone() -> None:
    made = Buffer(100, interval=10, ranks=2)
    made.now = 50.0
    assert [made.buffer.waiting] == [False]
    made.add(0, 1)
    assert [made.buffer.waiting, made.buffer.due] == [True, True]
    made.buffer.tick(50.0 + PATIENCE_S)
    assert made.tables == []
    made.buffer.tick(50.1 + PATIENCE_S)
    assert made.steps() == [[(1, 0)]]
    assert [made.buffer.waiting, made.buffer.due] == [False, False]
    made.now = 100.0
    made.add(0, 5)
    assert [made.buffer.waiting, made.buffer.due] == [True, False]
    made.now = 200.0
    made.add(0, 11)
    made.now = 205.0
    made.buffer.rewind(1, 11)  # that of another rank: what is due is due from the latest row on
    made.buffer.tick(200.0 + PATIENCE_S)
    assert len(made.tables) == 1
    made.buffer.tick(200.1 + PATIENCE_S)
    assert made.steps()[1:] == [[(5, 0), (11, 0)]]
    assert [made.buffer.waiting, made.buffer.due] == [False, False]


def test_many_ranks_share_a_small_table() -> None:
    made = Buffer(128, interval=100, ranks=1024)
    for number in range(1024):
        made.add(number, 1, rows=1, left_out=7)
        made.buffer.passed(number, 1)
    made.buffer.tick(1.0)
    assert [len(rows) for rows in made.tables] == [128]
    assert made.buffer.dropped == 1024 * 8 - 128


def test_steps_that_are_run_again_replace_what_waits() -> None:
    made = Buffer(100, interval=100)
    for step in (1, 50, 90):
        made.add(0, step)
        made.buffer.passed(0, step)
    made.buffer.tick(1.0)  # the table of step 1
    made.buffer.rewind(0, 40)
    made.add(0, 45)
    made.buffer.flush()
    assert made.steps()[-1] == [(45, 0)]


def row(cells: dict[str, Any], rank: int = 0) -> CompletionRow:
    return CompletionRow(1, rank, 0, "", "", cells)


def plain(cell: Any, tokenizer: str) -> Any:
    return cell


def test_columns_are_the_union_in_a_fixed_order() -> None:
    made = table([row({"own": 1, "reward": 0.5, "prompt": "p"}), row({"rejected": "r", "chosen": "c"}, 1)], plain, 100)
    assert made.headers == ["step", "rank", "prompt", "chosen", "rejected", "reward", "own"]
    assert made.rows == [[1, 0, "p", None, None, 0.5, 1], [1, 1, None, "c", "r", None, None]]


def test_text_is_cut_with_a_mark_and_made_safe() -> None:
    cells = {"long": "x" * 50, "code": '"--x_x--0_0--"', "screen": "\x1b[2Ja\0b\tc\nd", "bad": float("nan")}
    made = table([row(cells)], plain, 20)
    values = dict(zip(made.headers, made.rows[0], strict=True))
    assert values["long"] == "x" * 20 + " [... 30 more characters]"
    assert values["screen"] == "␛[2Ja␀b\tc\nd"
    assert values["bad"] is None
    (chart,) = as_charts(made)
    assert json.loads(chart.dump_options())["rowData"][0]["long"] == values["long"]


def test_headers_are_unique_and_without_dots() -> None:
    cells = {"step": 7, "reward/org/model-0.5B": 1.0, "a.b": 1, "a_b": 2}
    assert table([row(cells)], plain, 20).headers == ["step", "rank", "step_", "reward/org/model-0_5B", "a_b", "a_b_"]


def test_a_table_above_the_limit_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 1 << 20
    monkeypatch.setattr("swanlab_ray.actors.completions.tables.MEDIA_BYTES", limit)
    whole = Table(["step", "rank", "text"], [[1, number, "€" * 30_000] for number in range(30)])
    charts = as_charts(whole)
    assert len(charts) > 1
    contents = [chart.dump_options() for chart in charts]
    assert max(len(content.encode()) for content in contents) < limit
    assert [shown["rank"] for content in contents for shown in json.loads(content)["rowData"]] == list(range(30))
    (chart,) = as_charts(Table(["text"], [["€" * limit]]))  # one cell alone is too large
    assert len(chart.dump_options().encode()) < limit


def test_texts_stay_within_what_a_step_can_hold() -> None:
    texts = as_texts(Table(["step", "rank", "text"], [[1, number, f"t{number}"] for number in range(300)]))
    assert len(texts) <= MEDIA_ITEMS
    assert all(f"text: t{number}" in "\n".join(text.content for text in texts) for number in range(300))
    assert readable(["a", "b", "c"], [0.123456789, None, "x\x1by"]) == "a: 0.123457\nc: x␛y"


def test_each_row_is_a_text_with_its_step_and_rank_or_shares_one_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MEDIA_ITEMS", 2)
    rows: list[list[Any]] = [[1, 0, "a", 0.5], [1, 1, "b", None]]
    texts = as_texts(Table(["step", "rank", "text", "reward"], rows))
    assert [(one.caption, one.content) for one in texts] == [
        ("step 1 rank 0", "text: a\nreward: 0.5"),
        ("step 1 rank 1", "text: b"),
    ]
    texts = as_texts(Table(["step", "rank", "text"], [[1, 0, "a"], [1, 0, "b"], [2, 1, "c"]]))
    assert [(one.caption, one.content) for one in texts] == [
        ("step 1 rank 0", "step 1 rank 0\ntext: a\n\nstep 1 rank 0\ntext: b"),
        ("step 2 rank 1", "step 2 rank 1\ntext: c"),
    ]


def test_what_swanlab_takes_of_media_is_what_it_says() -> None:
    from swanlab.sdk.internal.run.components.consumer import builder

    (limits,) = (one for one in vars(builder).values() if hasattr(one, "_MEDIA_MAX_SIZE"))
    assert (MEDIA_BYTES, MEDIA_ITEMS) == (limits._MEDIA_MAX_SIZE, limits._MEDIA_MAX_LENGTH)


def test_columns_of_every_algorithm_stand_in_one_order() -> None:
    """Prompt and texts first, then what was made of them; a user's own columns follow as they came."""
    known = ["prompt", "completion", "chosen", "rejected", "label", "reward", "reward_chosen", "reward_rejected"]
    known += ["reward_diff", "advantage", "log_odds_ratio", "logp_diff", "logp_chosen", "logp_rejected"]
    cells: dict[str, Any] = {"own": 0, **{name: at for at, name in reversed(list(enumerate(known, 1)))}, "b": 15}
    made = table([CompletionRow(3, 1, 0, "dpo", "", cells)], Decoder().text, 100)
    assert made.headers == ["step", "rank", *known, "own", "b"]
    assert made.rows == [[3, 1, *range(1, 15), 0, 15]]


def test_token_ids_are_text_with_its_special_tokens() -> None:
    from tokenizers import Tokenizer as Real
    from tokenizers.models import WordLevel

    real = Real(WordLevel({"hello": 0, "world": 1, "<s>": 2}, unk_token="<s>"))
    real.add_special_tokens(["<s>"])
    decoder = Decoder(pytest.fail)
    decoder.learn(Tokenizer("real", real.to_str().encode()))
    assert decoder.text(np.array([2, 0, 1, 2], "<i4").tobytes(), "real") == "<s> hello world <s>"
    assert decoder.text("as it is", "real") == "as it is"


def test_token_ids_without_their_tokenizer_are_shown_as_numbers() -> None:
    said: list[str] = []
    decoder = Decoder(said.append)
    ids = np.array([5, 70000], "<i4").tobytes()
    assert decoder.text(ids, "never sent") == "token ids 5 70000"
    decoder.learn(Tokenizer("broken", b"{}"))
    assert decoder.text(ids, "broken") == decoder.text(ids, "broken") == "token ids 5 70000"
    (sentence,) = said
    assert sentence.startswith(
        "Completions are shown as token ids: the writer cannot load the ranks' tokenizer (Exception: "
    )
    assert sentence.endswith("); install `tokenizers` where it runs.")


def test_tables_weigh_in_the_queue_and_are_counted_when_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SwanLab that takes nothing: what waits for it is bounded."""
    opened = threading.Event()

    class Stuck(Sink):
        waits = False

        def _open(self) -> None:
            opened.wait()
            raise RuntimeError("boom")

    stuck = Stuck("local", lambda sentence: None, lambda sink: None)
    stuck.start()
    for step in range(1000):
        stuck.write(step, 0, {}, Table(["text"], [["x" * 100_000]] * 2))
    assert len(stuck._rows) <= QUEUE_BYTES // 200_000 + 1
    opened.set()
    wait_until(lambda: stuck.completions_lost == 2000)
