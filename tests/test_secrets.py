"""The secrets of a run, searched for in everything it leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from swanlab_ray.observer import archive
from swanlab_ray.observer.redact import plain
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
