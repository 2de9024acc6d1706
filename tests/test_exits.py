"""How a process ends: what speaks against success, and what does not."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

from swanlab_ray.observer.script.ending import describe
from tests.conftest import environment

WATCHED = """
import sys, threading
from swanlab_ray.observer.script.ending import ExitWatch
ExitWatch(lambda verdict: print("verdict:", verdict, flush=True))

def leave(code=3):
    frame_of_its_own = [1, 2]
    sys.exit(code)

"""
CRASHED = "verdict: ('crashed', 'sys.exit(3)')"
NOTHING = "verdict: None"


@pytest.mark.parametrize(
    ("code", "verdict", "exit_code"),
    [
        ("leave()", CRASHED, 3),
        ("leave(0)", NOTHING, 0),
        ("leave(None)", NOTHING, 0),
        ("leave('no data')", """verdict: ('crashed', "sys.exit('no data')")""", 1),
        ("try: leave()\nfinally: print('clean')", CRASHED, 3),
        ("try: 1 / 0\nexcept ZeroDivisionError: leave()", CRASHED, 3),
        ("import contextlib\nwith contextlib.ExitStack() as stack: stack.callback(print, 'x'); leave()", CRASHED, 3),
        ("try: leave()\nexcept SystemExit: pass", NOTHING, 0),
        ("try: leave()\nexcept SystemExit as error: kept = error", NOTHING, 0),
        ("try: leave()\nexcept BaseException as error: cycle = [error]; cycle.append(cycle); del cycle", NOTHING, 0),
        ("try: leave()\nexcept SystemExit: pass\nleave(4)", "verdict: ('crashed', 'sys.exit(4)')", 4),
        ("try: leave()\nexcept SystemExit: raise", CRASHED, 3),
        ("one = threading.Thread(target=leave); one.start(); one.join(); print('joined')", NOTHING, 0),
        ("1 / 0", "verdict: ('crashed', 'ZeroDivisionError: division by zero", 1),
    ],
)
def test_the_verdict_on_a_process(code: str, verdict: str, exit_code: int) -> None:
    """``sys.exit`` with a code is a crash where it ends the process: not in a thread, and not where it is caught."""
    source = WATCHED + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=120, env=environment()
    )
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("verdict")]
    assert said.startswith(verdict)
    assert done.returncode == exit_code
    assert "_Exit" not in done.stderr


AT_WORK = """
import sys, threading, time
from swanlab_ray.actors.wire.messages import Counts
from swanlab_ray.observer.script import threads

sys.setswitchinterval(1e-6)

def work():
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        Counts.model_validate({"logged": 1}).model_dump()

for _ in range(16):
    threads.start(threading.Thread(target=work, daemon=True))
"""


def test_threads_at_work_when_the_interpreter_ends_do_not_abort_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_WORK], capture_output=True, text=True, timeout=120, env=environment()
    )
    assert (done.returncode, done.stderr) == (0, "")


class _Nameless(type):
    def __getattribute__(cls, name: str) -> object:
        raise RuntimeError(name)


class _Odd(Exception, metaclass=_Nameless): ...


class _OddNotes(Exception):
    @property
    def __notes__(self) -> list[str]:  # type: ignore[override]
        raise RuntimeError("no notes")


@pytest.mark.parametrize(
    "error",
    [SyntaxError("x", ("file", 1, 1, b"code")), SyntaxError("x", ("file", 1, 1, 5)), _Odd("x"), _OddNotes("x")],  # type: ignore[arg-type]
    ids=["code of bytes", "code of numbers", "class", "notes"],
)
def test_an_exception_that_cannot_be_shown_is_told_by_its_name(error: Exception) -> None:
    """What raised here would take the place of the training's own error."""
    name = type.__getattribute__(type(error), "__name__")
    state, told = describe(error)
    assert state == "crashed"
    assert told == name or (told and name in told.splitlines()[0])  # Python 3.13 shows odd notes


def test_a_second_run_is_told_of_sigterm_also_where_another_thread_has_finished_the_first() -> None:
    """Only the main thread can give a signal back; by then the first run is over."""
    source = """
    import os, signal, threading, time
    from swanlab_ray.observer.script.sigterm import TerminationWatch
    first = TerminationWatch(lambda: print("first", flush=True))
    thread = threading.Thread(target=first.stop)
    thread.start()
    thread.join()
    TerminationWatch(lambda: print("second", flush=True))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())
    assert (done.stdout, done.returncode) == ("second\n", -signal.SIGTERM)
