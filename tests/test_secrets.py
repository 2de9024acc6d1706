"""The secrets of a run, searched for in everything it leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.conftest import Launch, SharedCluster
from tests.swanlab_file import only_run

SECRETS = {
    "SWANLAB_API_KEY": "s3cr3tKeyOfTheCloud",
    "SWANLAB_LARK_SECRET": "s3cr3tOfTheBot",
    "SWANLAB_LARK_WEBHOOK_URL": "https://open.feishu.cn/open-apis/bot/v2/hook/s3cr3tHook",
}


def files(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path


def test_no_secret_is_left_anywhere(launch: Launch, tmp_path: Path, in_cluster: SharedCluster) -> None:
    """A cloud run whose cloud refuses the connection, with all secrets set, and a crash that prints settings."""
    done = launch(
        """
        from swanlab_ray.observer import ObserverSettings, connect
        settings = ObserverSettings()
        observer = connect(settings)
        observer.config({"api_key": settings.api_key.get_secret_value(), "settings": settings})
        observer.log({"x": 1}, 0)
        print(settings, observer, observer.statistics())
        observer.flush()
        raise RuntimeError(f"settings were {settings!r}")
        """,
        ranks=0,
        SWANLAB_MODE="cloud",
        SWANLAB_API_HOST="http://127.0.0.1:1",
        **SECRETS,
    ).wait()
    assert "settings were" in done.output
    run = only_run(tmp_path / "swanlog")
    assert run.state == "crashed"
    assert run.scalars["x"] == {0: 1.0}  # kept offline, since the cloud was out of reach
    assert f"swanlab sync {run.path} --id" in done.output
    searched = 0
    for path in [*files(tmp_path), *files(in_cluster.session_dir / "logs")]:
        content = path.read_bytes()
        searched += 1
        for secret in ("s3cr3tKeyOfTheCloud", "s3cr3tOfTheBot", "s3cr3tHook"):
            assert secret.encode() not in content, f"{secret} in {path}"
    assert searched > 10
