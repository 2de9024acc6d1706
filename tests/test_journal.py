"""The journal on disks that fail, with successors that take over, and killed at every step."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from swanlab_ray.actors.journal import writing as journal_module
from swanlab_ray.actors.journal.files import Appender, Disk, being_written, journal_files
from swanlab_ray.actors.journal.framing import frame
from swanlab_ray.actors.journal.reading import Damaged, Follower, entries
from swanlab_ray.actors.journal.records import (
    Alert,
    Arrived,
    Batch,
    Ended,
    Entry,
    Header,
    Opened,
    UnknownFormat,
    pack,
    unpack,
)
from swanlab_ray.actors.journal.writing import Journal, Position
from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.runs.merging import merged
from swanlab_ray.actors.runs.summary import summarise
from swanlab_ray.actors.wire.messages import Counts
from tests.conftest import wait_until


def header(epoch: int) -> Header:
    return Header(kind="journal", run_id="r", epoch=epoch, host="h", pid=1, settings={"project": "p"})


def batch(seq: int, data: bytes = b"data") -> Batch:
    return Batch(0, "life", seq, time.time_ns(), 1, data)


class Kept:
    """A journal and what it reported."""

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        self.committed: list[tuple[Entry, Position]] = []
        self.trouble: list[OSError | None] = []
        self.fenced = 0
        self.journal = Journal(directory, header, self.trouble.append, self._count_fence, disk)
        self.journal.start(self.committed.extend)

    def _count_fence(self) -> None:
        self.fenced += 1

    def seqs(self) -> list[int]:
        return [entry.seq for entry, _ in self.committed if isinstance(entry, Batch)]


def stored(directory: Path) -> list[int]:
    """The batches that a reader finds, each once."""
    (run,) = find_runs([directory])
    seen: dict[int, None] = {}
    for entry in merged(run):
        if isinstance(entry, Batch):
            seen[entry.seq] = None
        assert not (isinstance(entry, Damaged) and not entry.damage.torn)
    return list(seen)


class FailingDisk(Disk):
    """Fails at its n-th call, and at as many more: with an error, or by writing only a part."""

    def __init__(self, n: int, error: int | None, more: int = 0) -> None:
        self.calls = 0
        self.n = n
        self.last = n + more
        self.error = error

    def _count(self, name: str) -> bool:
        self.calls += 1
        if not self.n <= self.calls <= self.last:
            return False
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return name == "write"

    def make_directory(self, path: Path) -> None:
        self._count("make_directory")
        super().make_directory(path)

    def create(self, path: Path) -> int:
        self._count("create")
        return super().create(path)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        return super().write(descriptor, data[: max(1, len(data) // 2)] if self._count("write") else data, offset)

    def sync(self, descriptor: int) -> None:
        self._count("sync")
        super().sync(descriptor)

    def truncate(self, descriptor: int, size: int) -> None:
        self._count("truncate")
        super().truncate(descriptor, size)

    def linked(self, descriptor: int) -> bool:
        self._count("linked")
        return super().linked(descriptor)

    def exists(self, path: Path) -> bool:
        self._count("exists")
        return super().exists(path)


@pytest.mark.parametrize("more", [0, 1, 6])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, None], ids=["ENOSPC", "EIO", "short write"])
def test_whatever_call_fails_everything_is_kept_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int | None, more: int
) -> None:
    """SQLite's way: the n-th call fails, for every n until none is left to fail; alone, or with those after it."""
    monkeypatch.setattr(journal_module, "RETRY_S", 0.001)
    n = 0
    while True:
        n += 1
        disk = FailingDisk(n, error, more)
        directory = tmp_path / str(n)
        kept = Kept(directory, disk)
        for seq in range(5):
            kept.journal.append(batch(seq))
            assert kept.journal.settled(10)
        assert kept.journal.close(10)
        assert kept.seqs() == [0, 1, 2, 3, 4]
        assert stored(directory) == [0, 1, 2, 3, 4]
        assert not kept.fenced
        assert list(journal_files(directory)) == list(range(1, len(journal_files(directory)) + 1))
        assert len(journal_files(directory)) <= 2
        troubles = [one for one in kept.trouble if one is not None]
        assert len(troubles) == (disk.calls >= n and error is not None)
        if disk.calls < n:
            break
    assert n > 15


def test_one_alert_while_the_disk_is_full_and_one_when_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "RETRY_S", 0.001)

    class FullDisk(Disk):
        full = True

        def write(self, descriptor: int, data: memoryview, offset: int) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(descriptor, data, offset)

    disk = FullDisk()
    kept = Kept(tmp_path, disk)
    kept.journal.append(batch(0), batch(1))
    assert not kept.journal.settled(0.2)
    assert [error.errno for error in kept.trouble if error] == [errno.ENOSPC]
    assert kept.journal.queued_bytes == 8
    disk.full = False
    assert kept.journal.settled(10)
    assert kept.trouble[-1] is None
    assert kept.journal.queued_bytes == 0
    kept.journal.close(10)
    assert stored(tmp_path) == [0, 1]
    assert len(journal_files(tmp_path)) == 1  # attempts leave no empty files behind


def test_a_disk_that_refuses_is_asked_again_after_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not as fast as a core can."""
    monkeypatch.setattr(journal_module, "RETRY_S", 0.1)
    monkeypatch.setattr(SickDisk, "failures", 0)
    disk = SickDisk()
    kept = Kept(tmp_path, disk)
    disk.fails = "sync"
    began = time.monotonic()
    kept.journal.append(batch(0))
    wait_until(lambda: SickDisk.failures >= 5)
    assert time.monotonic() - began >= 0.2  # an attempt in a new file syncs its header first
    disk.fails = "none"
    assert kept.journal.close(10)
    assert stored(tmp_path) == [0]


class SickDisk(Disk):
    """Fails where it is told to, as often as it is asked."""

    fails: str = ""
    error = errno.EIO
    room = 0
    failures = 0

    def _look(self, call: str) -> None:
        if call == self.fails:
            SickDisk.failures += 1
            raise OSError(self.error, os.strerror(self.error))

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        if self.fails == "write" and len(data) > self.room:
            super().write(descriptor, data[: self.room], offset)
            self._look("write")
        return super().write(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        self._look("sync")
        super().sync(descriptor)

    def exists(self, path: Path) -> bool:
        self._look("exists")
        return super().exists(path)


@pytest.mark.parametrize("before", [0, 1], ids=["nothing was committed yet", "something was committed"])
@pytest.mark.parametrize(
    ("fails", "error", "files"),
    [
        ("write", errno.ENOSPC, 1),
        ("write", errno.EDQUOT, 1),
        ("write", errno.EIO, 2),
        ("write", errno.EFBIG, 2),
        ("sync", errno.EIO, 2),
        ("sync", errno.ENOSPC, 2),
        ("exists", errno.ESTALE, 2),
    ],
)
def test_many_attempts_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, error: int, files: int, before: int
) -> None:
    """A header fits and what follows does not: no file a second, and what somebody frees is not filled with garbage."""
    monkeypatch.setattr(journal_module, "RETRY_S", 0.001)
    disk = SickDisk()
    kept = Kept(tmp_path, disk)
    for seq in range(before):
        kept.journal.append(batch(seq))
        assert kept.journal.settled(10)
    paths = journal_files(tmp_path)
    assert len(paths) == 1
    sizes = sum(path.stat().st_size for path in paths.values())
    header_size = len(frame(pack(header(1)), 0))
    SickDisk.failures, disk.error, disk.room, disk.fails = 0, error, header_size, fails
    kept.journal.append(batch(before, bytes(5000)))
    wait_until(lambda: SickDisk.failures > 30)
    disk.fails = "none"
    assert kept.journal.settled(10)
    left = journal_files(tmp_path)
    assert list(left) == list(range(1, 1 + (files if before else 1)))
    assert sum(path.stat().st_size for path in left.values()) < sizes + 5000 + 2 * header_size + 100
    assert not any(isinstance(found, Damaged) for path in left.values() for found in entries(path))
    kept.journal.close(10)
    assert stored(tmp_path) == list(range(before + 1))
    assert len([error for error in kept.trouble if error is not None]) == 1
    assert not kept.fenced


def test_without_locks_the_older_one_is_fenced_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some NFS."""

    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    old, new = Kept(tmp_path), Kept(tmp_path)
    assert being_written(tmp_path / "journal-000001.log") is None
    old.journal.append(batch(0))
    wait_until(lambda: old.fenced == 1)
    assert old.seqs() == []
    new.journal.append(batch(1))
    assert new.journal.settled(10)
    old.journal.close(10)
    new.journal.close(10)
    assert new.seqs() == [1]


def test_the_directory_is_asked_anew_before_the_older_one_acknowledges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An NFS client may remember for a minute that a file is not there, until the directory is opened."""
    fresh: list[bool] = [False]
    real_open, real_stat = os.open, os.stat

    def opened(path: Any, *arguments: Any, **more: Any) -> int:
        fresh[0] |= os.path.isdir(path)
        return real_open(path, *arguments, **more)

    def remembered(path: Any, *arguments: Any, **more: Any) -> os.stat_result:
        if str(path).endswith("journal-000002.log") and not fresh[0]:
            raise FileNotFoundError(errno.ENOENT, "remembered")
        return real_stat(path, *arguments, **more)

    disk = Disk()
    successor = tmp_path / "journal-000002.log"
    assert not disk.exists(successor)
    successor.touch()
    fresh[0] = False
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "stat", remembered)
    assert disk.exists(successor)


def modes(directory: Path) -> tuple[int, int]:
    kept = Kept(directory)
    kept.journal.append(batch(0))
    assert kept.journal.settled(10)
    kept.journal.close(10)
    (path,) = journal_files(directory).values()
    return directory.stat().st_mode & 0o777, path.stat().st_mode & 0o777


@pytest.mark.parametrize(
    ("log_dir", "umask", "expected"),
    [
        (None, 0o022, (0o700, 0o600)),  # not there yet
        (0o700, 0o022, (0o700, 0o600)),
        (0o755, 0o022, (0o755, 0o644)),
        (0o770, 0o002, (0o750, 0o640)),  # a team's
        (0o1777, 0o022, (0o700, 0o600)),  # as /tmp
        (0o755, 0o077, (0o700, 0o600)),
    ],
)
def test_a_journal_is_read_by_whoever_can_read_the_log_directory(
    tmp_path: Path, log_dir: int | None, umask: int, expected: tuple[int, int]
) -> None:
    """It has prompts and completions. Nobody else can write it."""
    directory = tmp_path / "logs"
    if log_dir is not None:
        directory.mkdir()
        directory.chmod(log_dir)
    before = os.umask(umask)
    try:
        assert modes(directory / "observer" / "r") == expected
    finally:
        os.umask(before)
    if log_dir is None:
        assert directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("whose", ["another writer's directory", "somebody's file"])
def test_a_directory_that_another_writer_makes_first_is_as_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    real = Path.mkdir

    def outrun(path: Path, *arguments: Any) -> None:
        if whose == "somebody's file":
            path.touch()
        else:
            real(path, *arguments)
        real(path, *arguments)

    monkeypatch.setattr(Path, "mkdir", outrun)
    if whose == "somebody's file":
        with pytest.raises(NotADirectoryError) as caught:
            Disk().make_directory(tmp_path / "observer" / "r")
        assert (caught.value.errno, caught.value.filename) == (errno.ENOTDIR, str(tmp_path / "observer"))
    else:
        Disk().make_directory(tmp_path / "observer" / "r")
        assert (tmp_path / "observer" / "r").is_dir()


class CountingDisk(Disk):
    """Notes down what it is asked for."""

    def __init__(self, takes_nothing: bool = False) -> None:
        self.calls: list[str] = []
        self.takes_nothing = takes_nothing

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        self.calls.append("write")
        return 0 if self.takes_nothing else super().write(descriptor, data, offset)

    def sync(self, descriptor: int) -> None:
        self.calls.append("sync")
        super().sync(descriptor)


def test_a_header_is_on_the_disk_before_anything_follows_it(tmp_path: Path) -> None:
    disk = CountingDisk()
    file = Appender(tmp_path / "journal-000001.log", header(1), disk)
    assert disk.calls == ["write", "sync"]
    assert [file.empty] == [True]
    assert (file.kept, file.size) == (file.size, (tmp_path / "journal-000001.log").stat().st_size)
    file.append([pack(batch(0))])
    assert [file.empty] == [True], "what is not kept does not count"
    file.kept = file.size
    assert [file.empty] == [False]
    file.close()
    file.close()


def test_what_waits_is_written_in_groups_of_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much came while the disk was busy; and all of it is counted until it is written."""
    monkeypatch.setattr(journal_module, "GROUP_BYTES", 1000)
    busy, free = threading.Event(), threading.Event()
    groups: list[int] = []

    class Busy(Disk):
        def write(self, descriptor: int, data: memoryview, offset: int) -> int:
            if b"first" in bytes(data):
                busy.set()
                free.wait(30)
            groups.append(bytes(data).count(b"life"))
            return super().write(descriptor, data, offset)

    kept = Kept(tmp_path, Busy())
    kept.journal.append(batch(0, b"first"))
    assert busy.wait(30)
    kept.journal.append(*(batch(seq, bytes(100)) for seq in range(1, 41)), Alert(text="x"), batch(41, bytes(5000)))
    assert not kept.journal.settled(0.05)
    assert kept.journal.queued_bytes == 5 + 40 * 100 + 5000
    free.set()
    assert kept.journal.settled(20)
    assert kept.journal.queued_bytes == 0
    assert kept.seqs() == list(range(42))
    assert groups == [0, 1, 10, 10, 10, 10, 1]  # the header's first
    assert kept.journal.close(10)


def test_a_disk_that_takes_nothing_and_says_no_error_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "journal-000001.log"
    with pytest.raises(OSError, match="nothing was written"):
        Appender(path, header(1), CountingDisk(takes_nothing=True))
    assert not path.exists()


def test_a_file_that_is_not_there_is_written_by_nobody(tmp_path: Path) -> None:
    path = tmp_path / "journal-000001.log"
    assert being_written(path) is False
    path.touch()
    assert being_written(path) is False
    file = Appender(tmp_path / "journal-000002.log", header(2), Disk())
    assert being_written(file.path) is True
    file.close()
    assert being_written(file.path) is False


def test_a_removed_directory_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The open file would go on taking data that nobody finds."""
    monkeypatch.setattr(journal_module, "RETRY_S", 0.001)
    directory = tmp_path / "run"
    kept = Kept(directory)
    kept.journal.append(batch(0))
    assert kept.journal.settled(10)
    shutil.rmtree(directory)
    kept.journal.append(batch(1))
    assert kept.journal.settled(10)
    assert isinstance(kept.trouble[0], FileNotFoundError)
    assert str(kept.trouble[0]) == f"[Errno {errno.ENOENT}] the directory has vanished: '{directory}'"
    assert stored(directory) == [1]
    kept.journal.close(10)


def test_a_successor_fences_the_older_one(tmp_path: Path) -> None:
    old = Kept(tmp_path)
    old.journal.append(batch(0))
    assert old.journal.settled(10)
    new = Kept(tmp_path)
    assert new.journal.earlier == (1,)
    old.journal.append(batch(1))
    wait_until(lambda: old.fenced == 1)
    assert old.seqs() == [0]
    new.journal.append(batch(1))
    assert new.journal.settled(10)
    assert new.seqs() == [1]
    assert not old.journal.settled(0.05)
    old.journal.close(10)
    new.journal.close(10)
    assert stored(tmp_path) == [0, 1]


def test_incarnations_that_begin_at_once_get_epochs_of_their_own(tmp_path: Path) -> None:
    journals = [Kept(tmp_path) for _ in range(4)]
    assert sorted(kept.journal.epoch for kept in journals) == [1, 2, 3, 4]
    for kept in journals:
        kept.journal.append(batch(0))
    wait_until(lambda: sum(kept.fenced for kept in journals) == 3)
    assert journals[-1].journal.settled(10)
    assert [kept.seqs() for kept in journals] == [[], [], [], [0]]


def test_files_are_followed_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "ROTATE_BYTES", 1000)
    kept = Kept(tmp_path)
    for seq in range(20):
        kept.journal.append(batch(seq, bytes(300)))
        assert kept.journal.settled(10)
    kept.journal.close(10)
    assert len(journal_files(tmp_path)) >= 5
    assert stored(tmp_path) == kept.seqs() == list(range(20))


def test_it_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    path = tmp_path / "journal-000001.log"
    assert being_written(path)
    for seq in range(50):
        kept.journal.append(batch(seq, os.urandom(3000)))
        if seq % 10 == 0:
            summary = summarise([path])
            assert not any(not damaged.damage.torn for damaged in summary.damaged)
    kept.journal.close(10)
    assert not being_written(path)


def test_it_can_be_read_while_files_are_followed_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "ROTATE_BYTES", 1000)
    directory = tmp_path / "r"  # as the run's: a file that is just begun is known by that
    kept = Kept(directory)
    follower, followed = Follower(directory, Position(0, 0)), []
    for seq in range(60):
        kept.journal.append(batch(seq, bytes(300)))
        if seq % 7 == 0:
            wait_until(lambda: bool(kept.committed))
            acknowledged, (_, until) = kept.seqs(), kept.committed[-1]
            assert stored(directory)[: len(acknowledged)] == acknowledged
            followed += [entry.seq for entry in follower.read(until) if isinstance(entry, Batch)]
    assert kept.journal.close(10)
    followed += [entry.seq for entry in follower.read(kept.committed[-1][1]) if isinstance(entry, Batch)]
    assert followed == list(range(60))


def test_a_text_that_is_no_unicode_holds_up_nothing(tmp_path: Path) -> None:
    """Names of files, hosts and GPUs, and what people put into the environment."""
    odd = "gpu-\udcff"
    arrived = Arrived(
        rank=0, world_size=1, life=odd, local_rank=0, host=odd, pid=1, pid_namespace=odd, gpu=odd, nonce=odd
    )
    ended = Ended(rank=0, life=odd, state="crashed", error=odd, ended_ns=0, counts=Counts(dropped={odd: 1}))
    kept = Kept(tmp_path)
    kept.journal.append(arrived, ended, Opened(mode="local", run_dir=odd, url=odd), Alert(text=odd), batch(0))
    assert kept.journal.settled(20)
    assert kept.journal.close(20)
    (run,) = find_runs([tmp_path])
    found = [entry for entry in merged(run) if not isinstance(entry, Header)]
    assert [type(entry) for entry in found] == [Arrived, Ended, Opened, Alert, Batch]
    assert [entry.text for entry in found if isinstance(entry, Alert)] == ["gpu-?"]


def test_a_journal_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    newer = pack(header(1)).replace(b'"version":1', b'"version":2')
    with pytest.raises(UnknownFormat, match=r"^it is of version 2, and this program reads up to 1: update it$"):
        unpack(newer)
    assert unpack(b'C{"type": "invented later", "time_ns": 1}') is None


_KILLED = """
import json, os, signal, sys, time
from pathlib import Path
from swanlab_ray.actors.journal import writing as module
from swanlab_ray.actors.journal.files import Disk
from swanlab_ray.actors.journal.writing import Journal
from swanlab_ray.actors.journal.records import Batch, Header

class MortalDisk(Disk):
    calls = 0
    def __getattribute__(self, name):
        method = super().__getattribute__(name)
        if name not in ("make_directory", "create", "write", "sync", "linked", "exists"):
            return method
        def killed(*args):
            MortalDisk.calls += 1
            if MortalDisk.calls == point: os.kill(os.getpid(), signal.SIGKILL)
            result = method(*args)
            MortalDisk.calls += 1
            if MortalDisk.calls == point: os.kill(os.getpid(), signal.SIGKILL)
            return result
        return killed

def run(directory, pipe):
    header = lambda epoch: Header(kind="journal", run_id="r", epoch=epoch, host="h", pid=1, settings={})
    say = lambda entries: [os.write(pipe, b"%d " % entry.seq) for entry, _ in entries]
    journal = Journal(directory, header, lambda error: None, lambda: None, MortalDisk())
    journal.start(say)
    for seq in range(4):
        journal.append(Batch(0, "life", seq, time.time_ns(), 1, b"x" * 20000))
        journal.settled(10)
    journal.close(10)
    os._exit(0)

results, point = {}, 0
while True:
    point += 1
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        run(Path(sys.argv[1]) / str(point), writing)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as said:
        results[point] = [int(seq) for seq in said.read().split()]
    if not os.WIFSIGNALED(status):
        break
print(json.dumps(results))
"""


def test_killed_before_and_after_every_call_to_the_disk(tmp_path: Path) -> None:
    """SIGKILL at each failpoint: what was acknowledged is there, nothing is there twice or out of order."""
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    acknowledged: dict[str, Any] = json.loads(done.stdout)
    assert len(acknowledged) > 30
    for point, seqs in acknowledged.items():
        runs = find_runs([tmp_path / point]) if (tmp_path / point).exists() else []
        found = [entry.seq for run in runs for entry in merged(run) if isinstance(entry, Batch)]
        assert found == list(range(len(found))), point
        assert set(seqs) <= set(found), point
    assert acknowledged[str(len(acknowledged))] == [0, 1, 2, 3]
