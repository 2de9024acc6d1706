"""What may be the name of a run, a title or a path, whoever says so: a user, a launcher, a journal from elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swanlab_ray.actors.journal.files import Appender, Disk
from swanlab_ray.actors.journal.records import Header
from swanlab_ray.actors.runs.finding import find_runs
from swanlab_ray.actors.settings import ObserverSettings, SettingsError, check_writable
from swanlab_ray.actors.wire.naming import is_run_id, run_id_of

_ODD = st.text(st.sampled_from("./-_a0Ü文🦢\\ \n\0\x1b\u202e~*\udc80"), max_size=70)
_WORDS = st.one_of(_ODD, st.text(max_size=80))
_ANY_TEXT = st.text(st.characters(), max_size=300)  # halves of characters too


@pytest.mark.parametrize(
    "run_id", ["run", "lr=1e-3,bs=8", "lr[a]-1", "_x", "训练-1", "v1.2", "a" * 64, "20261120-101500-abcdef"]
)
def test_run_ids_that_people_write_are_taken(run_id: str) -> None:
    assert ObserverSettings(project="p", run_id=run_id).run_id == run_id


@pytest.mark.parametrize(
    "run_id",
    [".", "..", "...", ".hidden", "-x", "--help", "a/b", "../up", "/", "a\\b", "a b", "a\0b", "a\x1b[1m", "a\u202eb",
     "a\u2028b", "a\udc80", "~", "a" * 65, "🦢" * 64, "*"],
)  # fmt: skip
@pytest.mark.parametrize("how", ["keyword", "OBSERVER_RUN_ID"])
def test_run_ids_that_are_no_plain_name_are_refused(run_id: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's directories are made, swept and removed by its id: "." would be everybody's."""
    if how == "keyword":
        values = {"run_id": run_id}
    elif "\0" in run_id:
        return  # no environment can hold it
    else:
        values = {}
        monkeypatch.setenv(how, run_id)
    with pytest.raises(SettingsError, match=r"^Invalid run_id .*: a run id is 1 to 64 characters"):
        ObserverSettings(project="p", **values)


@given(_WORDS | _ANY_TEXT)
def test_what_is_a_run_id_is_one_directory_below_its_root(text: str) -> None:
    root = Path("/tmp/root")
    for run_id in (text, run_id_of(text)):
        if is_run_id(run_id):
            path = root / run_id
            assert path.parent == root
            assert Path(os.path.normpath(path)) == path
            assert len(os.fsencode(path.name + ".log")) <= 255
            assert ObserverSettings(project="p", run_id=run_id).run_id == run_id
    assert is_run_id(run_id_of(text))
    assert is_run_id(f"{run_id_of(text)}-1234567")  # a second run of the same job


def test_long_words_that_begin_alike_make_different_run_ids() -> None:
    assert run_id_of("x" * 100) != run_id_of("x" * 101)
    assert run_id_of("x" * 56) == "x" * 56  # 8 of the 64 are kept free for the number of a second run
    assert (run_id_of("x" * 57)[:48], len(run_id_of("x" * 57))) == ("x" * 47 + "-", 56)
    assert run_id_of("@ /") == "run"
    assert run_id_of("mpi-prterun-host-42@1") == "mpi-prterun-host-42-1"


@given(st.sampled_from(["run_id", "project", "experiment_name", "description", "workspace"]), _WORDS | _ANY_TEXT)
def test_any_text_is_taken_or_refused_with_one_sentence(field: str, text: str) -> None:
    said = ""
    try:
        said = str(ObserverSettings(**{"project": "p", field: text}).public())
    except SettingsError as error:
        said = str(error)
    assert "\n" not in said
    assert "\x1b" not in said
    said.encode()  # it can be printed and kept


@given(_ANY_TEXT | st.from_regex(r"[~/.]{0,3}[a-z\0]{0,300}", fullmatch=True) | st.binary() | st.none() | st.integers())
def test_any_log_dir_is_a_directory_or_refused_with_one_sentence(value: Any) -> None:
    for one in (value, Path(value)) if isinstance(value, str) else (value,):
        try:
            log_dir = ObserverSettings(project="p", log_dir=one).log_dir
            assert log_dir.is_absolute()
            check_writable(log_dir)
        except SettingsError as error:
            str(error).encode()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"log_dir": "~nobody-of-this-name/x"}, "begins with a home directory that is not known here: write it out"),
        ({"log_dir": "a\udc80"}, "is not readable text: write the path in UTF-8"),
        ({"log_dir": Path("a\udc80")}, "is not readable text: write the path in UTF-8"),
        ({"log_dir": "a\0b"}, "is not readable text"),
        ({"log_dir": 5}, "Invalid log_dir 5: name a directory as text"),
        ({"project": ".."}, "Invalid project '..': it is a part of an address"),
        ({"workspace": "a/../b"}, "Invalid workspace 'a/../b': it is a part of an address"),
        ({"experiment_name": "a\x1b[2Jb"}, r"Invalid experiment_name 'a\x1b[2Jb': '\x1b' in it is no text"),
    ],
)
def test_names_and_paths_that_cannot_work_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        ObserverSettings(**{"project": "p", **values})
    assert sentence in str(caught.value)


def test_a_home_that_is_not_set_is_no_matter_until_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def nobody(*_: object) -> None:
        raise KeyError("no such user")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert ObserverSettings(project="p").log_dir == Path.cwd() / "swanlog"
    with pytest.raises(SettingsError, match="begins with a home directory that is not known here"):
        ObserverSettings(project="p", log_dir="~/runs")


@pytest.mark.parametrize("name", ["x" * 300, "d/" * 3000])
def test_a_log_dir_that_no_file_system_takes_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot be written \(File name too long\)"):
        check_writable(tmp_path / name)


def test_a_parent_that_cannot_be_entered_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``Path.exists`` does below a directory of somebody else's."""

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(SettingsError, match=r"cannot be written \(Permission denied\)"):
        check_writable(tmp_path / "x")


@pytest.mark.parametrize("run_id", ["../../etc", ".", "a/b", "x" * 300, "a b"])
def test_a_journal_from_elsewhere_cannot_name_a_path(run_id: str, tmp_path: Path) -> None:
    """A header says which run a file belongs to; what is read back is a plain name all the same."""
    header = Header(kind="journal", run_id=run_id, epoch=1, host="h", pid=1, settings={})
    Appender(tmp_path / "journal-000001.log", header, Disk()).close()
    (run,) = find_runs([tmp_path])
    assert is_run_id(run.run_id)
