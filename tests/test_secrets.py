"""The secrets of a run, searched for in everything it leaves behind."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from swanlab_ray.observer.encoding.redact import plain
from swanlab_ray.observer.history import archive
from swanlab_ray.observer.script.ending import describe
from swanlab_ray.observer.script.notices import logger
from tests.conftest import Launch, SharedCluster
from tests.swanlab_cloud import KEY, SwanLabCloud

SECRETS = {
    "SWANLAB_LARK_SECRET": "s3cr3tOfTheBot",
    "SWANLAB_LARK_WEBHOOK_URL": "http://127.0.0.1:1/open-apis/bot/v2/hook/s3cr3tHook",
}


def files(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path


CRASH = """
    from swanlab_ray.observer import ObserverSettings, connect
    settings = ObserverSettings()
    observer = connect(settings)
    assert observer.wait_ready(600)
    observer.config({"api_key": settings.api_key.get_secret_value(), "settings": settings})
    observer.log({"x": 1}, 0)
    print(settings, observer, observer.statistics())
    observer.flush(600)
    raise RuntimeError(f"settings were {settings!r}")
"""


def test_no_secret_is_left_anywhere(launch: Launch, tmp_path: Path, in_cluster: SharedCluster) -> None:
    """A run in the cloud with all secrets set, and a crash that prints settings."""
    with SwanLabCloud() as cloud:
        done = launch(CRASH, ranks=0, SWANLAB_MODE="cloud", **cloud.environment() | SECRETS).wait()
        assert "settings were" in done.output
        assert cloud.only().points["x"] == {0: 1.0}
        assert cloud.only().state == "CRASHED"
    search(tmp_path, in_cluster)


@pytest.mark.takes(70)
def test_nor_where_the_cloud_is_out_of_reach(launch: Launch, tmp_path: Path, in_cluster: SharedCluster) -> None:
    nowhere = {"SWANLAB_API_KEY": KEY, "SWANLAB_API_HOST": "http://127.0.0.1:1"}
    done = launch(CRASH, ranks=0, SWANLAB_MODE="cloud", **nowhere | SECRETS).wait()
    assert "settings were" in done.output
    run = search(tmp_path, in_cluster)
    assert archive.latest_values(run) == {"x": (0, 1.0)}  # in the journal
    assert f"swanlab-ray sync {run.files.paths[0].parent}" in done.output


def search(directory: Path, cluster: SharedCluster) -> archive.Run:
    """The run that is there, once no secret was found in what it has left behind."""
    (run,) = archive.load(directory / "swanlog")
    assert run.state == "crashed"
    searched = 0
    for path in [*files(directory), *files(cluster.session_dir / "logs")]:
        content = path.read_bytes()
        searched += 1
        for secret in (KEY, "s3cr3tOfTheBot", "s3cr3tHook"):
            assert secret.encode() not in content, f"{secret} in {path}"
    assert searched > 10
    return run


def test_a_configuration_is_kept_without_its_secrets() -> None:
    told = {"hub_token": "hf_1", "tracking": {"uri": "https://me:pw@host:5000/x"}, "lr": 0.1, "keys": ["a"]}
    assert plain(told) == {"hub_token": "***", "tracking": {"uri": "https://***@host:5000/x"}, "lr": 0.1, "keys": ["a"]}


def leaking() -> None:
    password = "s3cr3t-Password9"
    (lambda key: 1 / 0)(key="s3cr3t-Of-The-Line9")
    raise AssertionError(password)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("login(api_key='s3cr3t-9') failed"), "RuntimeError: login(api_key='***') failed"),
        (OSError("GET https://me:s3cr3t-9@host/x?token=s3cr3t-9"), "OSError: GET https://***@host/x?token=***"),
        (ValueError("Bearer s3cr3t-0123456789"), "ValueError: Bearer ***"),
        (SystemExit("--password s3cr3t-9 is wrong"), "sys.exit('--password *** is wrong')"),
    ],
)
def test_the_message_of_an_error_holds_no_secret(error: BaseException, told: str) -> None:
    assert describe(error)[1] == told


def test_an_error_says_where_it_was_raised_without_code() -> None:
    try:
        leaking()
    except ZeroDivisionError as error:
        state, text = describe(error)
    first, *places = text.splitlines()
    assert (state, first) == ("crashed", "ZeroDivisionError: division by zero")
    here = Path(__file__)
    assert [place.split(":")[0].strip() for place in places] == [str(here)] * 3
    assert [place.rpartition(" in ")[2] for place in places][1:] == ["leaking", "leaking.<locals>.<lambda>"]
    with pytest.raises(SyntaxError) as raised:
        compile("login('s3cr3t') if", "train.py", "exec")
    told = describe(raised.value)[1]
    assert "s3cr3t" not in told
    assert "(train.py:1)" in told


def test_a_message_of_ours_holds_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "swanlab_ray"):
        logger.warning("%s failed: %s", "https://me:s3cr3t@host", "api_key=s3cr3t")
    assert [record.getMessage() for record in caplog.records] == ["https://***@host failed: api_key=***"]
