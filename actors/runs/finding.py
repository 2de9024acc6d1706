"""Which runs there are under a directory, by the headers and names of files."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from swanlab_ray.actors.journal import framing
from swanlab_ray.actors.journal.records import Header, UnknownFormat, unpack
from swanlab_ray.actors.runs.at_work import AtWork, at_work
from swanlab_ray.actors.wire.naming import is_run_id, run_id_of


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The files of one run that were found under some paths."""

    run_id: str
    journals: list[Path]
    spools: list[Path]
    header: Header

    @property
    def paths(self) -> list[Path]:
        """Journals in order, then spools."""
        return self.journals + self.spools

    @property
    def ambiguous(self) -> bool:
        """Journals lie in several directories: of one run on several machines, or of two runs with one id."""
        return len({path.parent for path in self.journals}) > 1

    @property
    def at_work(self) -> AtWork | None:
        """Who writes it at present: its writer, or a rank its spool."""
        latest = {path.parent: path for path in self.journals}
        found = (at_work(path, read_header(path) or self.header) for path in [*latest.values(), *self.spools])
        return next((one for one in found if one is not None), None)

    @property
    def in_progress(self) -> bool:
        """Whether somebody is at work on it."""
        return self.at_work is not None


def find_runs(paths: list[Path]) -> list[RunFiles]:
    """The runs whose files lie at or under these paths: files, run directories, log directories.

    Files of one run that were collected from several machines are put together by their run id.

    Raises:
        FileNotFoundError: a path does not exist.
    """
    files: dict[str, dict[Path, Header]] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        if not os.access(path, os.R_OK if path.is_file() else os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        candidates = [path] if path.is_file() else [*path.rglob("journal-*.log"), *path.rglob("spool-*.log")]
        for candidate in candidates:
            header = _header_of(candidate)
            if header is not None:
                if not is_run_id(header.run_id):  # it is used as a name, and this file may be anybody's
                    header = header.model_copy(update={"run_id": run_id_of(header.run_id)})
                files.setdefault(header.run_id, {})[candidate.resolve()] = header
    runs = []
    for run_id, found in files.items():
        # Epochs count up within a directory; directories of machines that share none are told apart by time.
        begun: dict[Path, int] = {}
        for path, header in found.items():
            begun[path.parent] = min(begun.get(path.parent, header.time_ns), header.time_ns)
        order = sorted(found, key=lambda path: (begun[path.parent], str(path.parent), found[path].epoch, path.name))
        journals = [path for path in order if found[path].kind == "journal"]
        spools = [path for path in order if found[path].kind == "spool"]
        told = [found[path] for path in (journals or spools) if found[path].settings]
        runs.append(RunFiles(run_id, journals, spools, told[-1] if told else found[order[-1]]))
    return sorted(runs, key=lambda run: run.header.time_ns)


def _header_of(path: Path) -> Header | None:
    """What is known of a file before it is read: also of one that will be refused then, which costs no other."""
    try:
        header = read_header(path) if path.is_file() else None  # nobody waits for the other end of a pipe
    except UnknownFormat:
        header = None
    return header or _header_by_name(path)


def read_header(path: Path) -> Header | None:
    """The header of a file; None if it has none that can be read.

    Raises:
        UnknownFormat: it is of a newer version.
    """
    try:
        for found in framing.read(path):
            if isinstance(found, framing.Damage):
                return None
            entry = unpack(found.payload)
            return entry if isinstance(entry, Header) else None
    except OSError:
        pass
    return None


def _header_by_name(path: Path) -> Header | None:
    """What a file's name and place say, where its header is damaged: it must not be overlooked for that."""
    kind, _, number = path.stem.partition("-")
    number = number.partition("-")[0]
    if kind not in ("journal", "spool") or not number.isdigit() or path.suffix != ".log" or not path.is_file():
        return None
    return Header(
        kind="journal" if kind == "journal" else "spool",
        run_id=path.resolve().parent.name,
        epoch=int(number),
        host="",
        pid=0,
        settings={},
        time_ns=path.stat().st_mtime_ns,
    )
