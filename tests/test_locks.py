"""A lock that says that a process lives, however it ends, and that no fork keeps."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from swanlab_ray.actors.wire import locks
from swanlab_ray.actors.wire.locks import hold_lock, holder, nobody_holds, pid_namespace, release_lock


def in_a_fork(asked: Callable[[], int]) -> int:
    """What a child of this process says."""
    child = os.fork()
    if child == 0:
        code = 77
        try:
            code = asked()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_lock_is_seen_by_others_and_by_the_process_that_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "alive"
    assert nobody_holds(str(path)), "there is no such file"
    descriptor = hold_lock(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for _ in range(2):  # asking does not release it
        assert not nobody_holds(str(path))
        assert in_a_fork(lambda: nobody_holds(str(path))) == 0
    mine = os.getpid()
    assert in_a_fork(lambda: holder(str(path)) == mine) == 1
    release_lock(descriptor)
    assert nobody_holds(str(path))
    assert in_a_fork(lambda: nobody_holds(str(path))) == 1
    assert in_a_fork(lambda: holder(str(path)) is None) == 1
    assert holder(str(tmp_path / "missing")) is None


def test_several_may_hold_it_and_it_is_free_after_the_last(tmp_path: Path) -> None:
    path = str(tmp_path / "alive")
    reading, writing = os.pipe()
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        hold_lock(path)
        os.write(told, b"x")
        os.read(reading, 1)  # until its parent lets go, or dies
        os._exit(0)
    os.close(reading)
    os.read(ready, 1)
    assert holder(path) == child
    assert not nobody_holds(path)
    release_lock(hold_lock(path))
    assert not nobody_holds(path)
    os.close(writing)
    os.waitpid(child, 0)
    assert nobody_holds(path)
    os.close(ready)
    os.close(told)


def test_a_fork_does_not_keep_its_parent_s_lock(tmp_path: Path) -> None:
    """A process that has died may have left children behind, as a data loader's workers."""
    path = str(tmp_path / "alive")
    reading, writing = os.pipe()

    def leaves_a_child() -> int:
        hold_lock(path)
        if os.fork() == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
        return 5

    assert in_a_fork(leaves_a_child) == 5
    assert nobody_holds(path)
    os.close(reading)
    os.close(writing)


def test_a_file_that_took_the_place_of_the_locked_one_is_nobody_s(tmp_path: Path) -> None:
    path = tmp_path / "alive"
    descriptor = hold_lock(str(path))
    path.rename(tmp_path / "before")
    path.touch()
    assert nobody_holds(str(path))
    assert not nobody_holds(str(tmp_path / "before"))
    release_lock(descriptor)
    assert nobody_holds(str(tmp_path / "before"))


def test_a_descriptor_that_its_user_has_closed_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "alive"
    os.close(hold_lock(str(path)))
    assert nobody_holds(str(path))
    assert path.stat().st_ino not in [file for _, _, file in locks._held.values()]
    assert in_a_fork(lambda: nobody_holds(str(path))) == 1
    release_lock(hold_lock(str(path)))
    release_lock(10**6)  # closed twice
    assert path.stat().st_ino not in [file for _, _, file in locks._held.values()]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").touch()
    (tmp_path / "alive").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match="symbolic links"):
        hold_lock(str(tmp_path / "alive"))


def test_asking_leaves_no_descriptor_open(tmp_path: Path) -> None:
    path = tmp_path / "alive"
    path.touch()
    for _ in range(3):
        assert nobody_holds(str(path))
        assert holder(str(path)) is None
    opened = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # of a thread that another test has left
            opened.add(os.readlink(descriptor))
    assert opened
    assert str(path) not in opened


def test_a_machine_is_known_by_its_boot_and_its_view_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither can be read, only this process sees itself."""
    boot, _, namespace = pid_namespace().partition(":")
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert namespace == os.readlink("/proc/self/ns/pid")

    def refuse(path: str) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "readlink", refuse)
    assert pid_namespace() == f"{os.uname().nodename}:{os.getpid()}"
