"""Where output goes: full disks, closed pipes, narrow terminals, encodings without the letters; odd log directories."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from swanlab_ray.observer.cli import main
from swanlab_ray.observer.job.identity import fresh_run_id
from tests.journals import write_file
from tests.test_looking import everything_called, header, squeezed

COMMAND = str(Path(sys.executable).with_name("swanlab-ray"))
LONG = "lr[a]-1-a-rather-long-id-of-a-run-of-a-series"


@pytest.fixture
def log_dir(tmp_path: Path) -> Path:
    for run_id in (LONG, "中文运行"):
        write_file(tmp_path / "observer" / run_id / "journal-000001.log", header(run_id), everything_called("中文 é"))
    return tmp_path


def invoke(*arguments: str, charset: str = "utf-8", **env: str) -> Result:
    done = CliRunner(charset=charset).invoke(main, arguments, env=env)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done


@pytest.mark.parametrize("command", ["show --json --log-dir {}", "--help"])
def test_a_full_disk_is_one_sentence(log_dir: Path, command: str) -> None:
    with open("/dev/full", "w") as full:
        words = [COMMAND, *command.format(log_dir).split()]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "Error: The output cannot be written: No space left on device.\n"


def test_a_pipe_without_a_reader_ends_quietly(log_dir: Path) -> None:
    words = [COMMAND, "show", "--log-dir", str(log_dir)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(120) in (1, 141)


def test_closed_streams_are_no_error(log_dir: Path) -> None:
    done = subprocess.run(["sh", "-c", f"{COMMAND} runs --log-dir {log_dir} >&- 2>&-"], timeout=120)
    assert done.returncode == 0


@pytest.mark.parametrize("charset", ["ascii", "latin-1", "gb2312", "utf-8"])
@pytest.mark.parametrize("view", [["runs"], ["show"], ["show", "--completions"], ["show", "--phases"]])
def test_a_terminal_shows_what_it_has(log_dir: Path, charset: str, view: list[str]) -> None:
    """Frames of ASCII where it has no others, and letters that it lacks by their numbers."""
    done = invoke(*view, "--log-dir", str(log_dir), charset=charset, COLUMNS="200")
    assert done.exit_code == 0
    shown = done.stdout_bytes.decode(charset)
    assert "中文".encode(charset, "backslashreplace").decode(charset) in shown
    assert charset == "utf-8" or not set("╭─│") & set(shown)


@pytest.mark.parametrize("columns", ["10", "40", "80", "200"])
def test_nothing_is_cut_on_a_narrow_terminal(log_dir: Path, columns: str) -> None:
    for view in (["runs"], ["show", LONG]):
        done = invoke(*view, "--log-dir", str(log_dir), COLUMNS=columns)
        assert done.exit_code == 0
        assert LONG in squeezed(done.stdout)
        for column in ("state", "events" if view == ["runs"] else "missing"):
            assert column in squeezed(done.stdout)
        assert "…" not in done.stdout
    assert f"run: {LONG}\n" in invoke("runs", "--log-dir", str(log_dir), COLUMNS="80").stdout


def test_ids_of_our_own_making_fit_into_a_table_of_80_columns(tmp_path: Path) -> None:
    ours = fresh_run_id("demo")
    write_file(
        tmp_path / "observer" / ours / "journal-000001.log",
        header(ours, time_ns=1_700_000_000 * 10**9),
        everything_called("x")[:1],
    )
    lines = invoke("runs", "--log-dir", str(tmp_path), COLUMNS="80").stdout.splitlines()
    assert lines[0].startswith("╭")
    assert max(map(len, lines)) <= 80
    assert "│lost│" in lines[1] + lines[2]
    assert any(line.startswith(f"│{ours}│") for line in lines)


def test_a_pipe_gets_whole_lines(log_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    (line,) = [one for one in invoke("runs", "--log-dir", str(log_dir)).stdout.splitlines() if LONG in one]
    assert "crashed" in line
    assert "\x1b" not in line


def test_log_directories_of_all_kinds(log_dir: Path) -> None:
    """A file, an empty one, one that is missing, a pipe, a name that is too long: one sentence each."""
    (log_dir / "file").write_text("no journal")
    (log_dir / "empty").mkdir()
    (log_dir / "fifo").mkdir()
    fifo = log_dir / "fifo" / "journal-000001.log"
    subprocess.run(["mkfifo", fifo], check=True)
    for name in ("file", "empty", "missing", "fifo", "x" * 5000, "~nobody-of-that-name"):
        place = name if name.startswith("~") else str(log_dir / name)
        for command in (["runs"], ["show"], ["show", "some"], ["trace"]):
            done = invoke(*command, "--log-dir", place)
            assert done.exit_code in (1, 2)
            # A writer of another test, which ends in its own time, may say how it is in between.
            said = [line for line in done.stderr.splitlines() if " | ranks " not in line]
            assert len(said[-1]) > 20
            assert said[-1].startswith("Error: ")


@pytest.mark.parametrize("prefix", ["*", "lr*", "lr[a]*", ".*", "lr[b-z]", "", "[", "\\", "../../x", "%s", "lr[a]-1\n"])
def test_a_run_id_is_no_pattern(log_dir: Path, prefix: str) -> None:
    done = invoke("show", prefix, "--log-dir", str(log_dir))
    assert done.exit_code == 1
    assert "names no run in" in done.stderr
    assert invoke("show", "lr[a]-1", "--log-dir", str(log_dir)).exit_code == 0


def test_a_directory_whose_name_is_no_unicode(log_dir: Path) -> None:
    """As one that was copied from a machine of another encoding: it can be read, and its name stands for itself."""
    odd = log_dir.with_name(os.fsdecode(b"caf\xe9 [x]"))
    log_dir.rename(odd)
    (run, _) = json.loads(invoke("runs", "--json", "--log-dir", str(odd)).stdout)
    assert "caf\\udce9 [x]" in run["files"][0]
    for command in (["runs"], ["show"], ["trace", "-o", str(odd / "t.json")]):
        assert invoke(*command, "--log-dir", str(odd)).exit_code == 0
    verified = invoke("verify", str(odd))
    assert verified.exit_code == 0
    assert "caf\ufffd [x]" in verified.stdout
    assert "caf\ufffd [x]" in invoke("show", "nobody", "--log-dir", str(odd)).stderr
