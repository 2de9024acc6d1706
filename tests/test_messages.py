"""What the observer says harms nobody: standard error may be closed, full, broken, stopped, or not UTF-8."""

from __future__ import annotations

import io
import logging
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.events import Scalars
from swanlab_ray.observer.job.identity import Identity
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.script import notices
from tests.conftest import environment
from tests.shaky_link import ShakyLink


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def without_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_pipe() -> int:
    """A pager that nobody scrolls: whoever writes there waits."""
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(1024))
    os.set_blocking(writer, True)
    return writer


def stopped_terminal() -> int:
    """Ctrl-S."""
    _, terminal = pty.openpty()
    termios.tcflow(terminal, termios.TCOOFF)
    return terminal


def closed() -> int:
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.close(descriptor)
    return descriptor


@contextmanager
def alone() -> Iterator[None]:
    """As where the application has not configured logging; pytest has."""
    root = logging.getLogger()
    kept, root.handlers = root.handlers, []
    try:
        yield
    finally:
        root.handlers = kept


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [full, without_reader, full_pipe, stopped_terminal, closed, None])
def test_whatever_standard_error_is_everything_arrives_and_nothing_waits(
    make: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = ShakyLink()
    if callable(make):
        # It closes nothing when it is collected: its number may be that of another file by then.
        file = io.FileIO(os.open(os.devnull, os.O_WRONLY), "w", closefd=False)
        stream = io.TextIOWrapper(file, write_through=True)
        os.close(stream.fileno())
        descriptor = make()
        if descriptor != stream.fileno():
            with suppress(OSError):
                os.dup2(descriptor, stream.fileno())
        monkeypatch.setattr(sys, "stderr", stream)
    else:
        monkeypatch.setattr(sys, "stderr", None)  # as in a process without any
    with alone():
        observer = Observer(ObserverSettings(project="p", log_dir=tmp_path), Identity(0, 1, 0, 1), link)
        for step in range(30):
            observer.log({"x": step, f"bad{step}": [1, 2], "worse": 1j}, step)  # of which is told
        assert observer.finish(timeout=20)
    assert [event.step for event in link.taken if isinstance(event, Scalars)] == list(range(30))


def test_a_line_waits_until_the_terminal_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    filled = 0
    with suppress(BlockingIOError):
        while True:
            filled += os.write(writer, bytes(1024))
    monkeypatch.setattr(sys, "stderr", os.fdopen(writer, "w"))
    with alone():
        notices.logger.warning("the first")
        assert len(os.read(reader, filled)) == filled
        notices.logger.warning("the second")
    assert os.read(reader, 1000).decode() == "swanlab-ray: the first\nswanlab-ray: the second\n"


def test_a_terminal_that_is_not_utf8_shows_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    with alone():
        notices.logger.warning("'损失' is not logged")
    assert raw.getvalue() == b"swanlab-ray: '\\u635f\\u5931' is not logged\n"


def test_an_application_whose_logging_raises_is_not_ended_by_ours(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("the log server is away")

    def strange(record: logging.LogRecord) -> bool:
        raise RuntimeError("a filter for other records")

    broken = Broken()
    logging.getLogger().addHandler(broken)
    try:
        notices.logger.warning("one")
        notices.logger.addFilter(strange)
        notices.logger.warning("two")
        notices.logger.warning("%d", "three")
    finally:
        logging.getLogger().removeHandler(broken)
        notices.logger.removeFilter(strange)
    assert [record.message for record in caplog.records][:1] == ["one"]


def test_warnings_that_are_errors_end_nothing() -> None:
    """``python -W error``: importing and logging raise no warning of our own."""
    code = (
        "from swanlab_ray.observer import connect; o = connect(project='p', mode='disabled'); o.log({'x': 1}); "
        "import swanlab_ray.observer.session; print('fine')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, env=environment()
    )
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


@pytest.mark.timeout(60)
def test_a_line_longer_than_a_pipe_takes_makes_nobody_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stderr", os.fdopen(writer, "w"))
    line = "".join(f"{number:06}" for number in range(15_000))  # 90,000 characters; a pipe holds 65,536 bytes
    with alone():
        notices.logger.warning(line)
        said = os.read(reader, 1 << 20)
        notices.logger.warning("the next")
    os.set_blocking(reader, False)
    with suppress(BlockingIOError):
        while more := os.read(reader, 1 << 20):
            said += more
    assert said.decode() == f"swanlab-ray: {line}\nswanlab-ray: the next\n"
