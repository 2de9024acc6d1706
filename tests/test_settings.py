from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from swanlab_ray.actors.settings import ObserverSettings, SettingsError, check_writable


@pytest.mark.parametrize(
    ("name", "kind", "default"),
    [
        ("use_swanlab", bool, False),
        ("project", str, None),
        ("experiment_name", str, None),
        ("description", str, None),
        ("mode", str, "cloud"),
        ("workspace", str, None),
        ("api_key", str, None),
        ("web_host", str, None),
        ("api_host", str, None),
        ("log_model", bool, False),
        ("lark_webhook_url", str, None),
        ("lark_secret", str, None),
        ("log_completions", bool, True),
        ("completion_log_interval", int, 100),
        ("completion_max_buffer", int, 128),
    ],
)
def test_every_parameter_has_its_default_and_type(name: str, kind: type, default: Any) -> None:
    assert getattr(ObserverSettings(), name) == default
    texts = {
        "mode": "offline",
        "web_host": "https://x.example",
        "api_host": "https://x.example",
        "lark_webhook_url": "https://x.example/open-apis/bot/v2/hook/abc",
    }
    good = {bool: True, int: 7, str: texts.get(name, "value")}
    extra = {"project": "p"} if name == "use_swanlab" else {}
    settings = ObserverSettings(**{name: good[kind]}, **extra)
    value = getattr(settings, name)
    assert (value.get_secret_value() if hasattr(value, "get_secret_value") else value) == good[kind]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"project": "p", "mode": "invalid-mode"},
         "Invalid swanlab_mode: 'invalid-mode'. Valid options: cloud, local, offline, disabled"),
        ({"project": ""}, "swanlab_project cannot be an empty string. Give the project a name, or leave it out."),
        ({"use_swanlab": True},
         "SwanLab enabled but 'swanlab_project' is not set: pass project='my-project' or set SWANLAB_PROJ_NAME."),
        ({"projekt": "p"}, "Unknown setting 'projekt': did you mean 'project'?"),
        ({"project": "a b"},
         "Invalid project 'a b': a project name is 1 to 100 of the characters 0-9 a-z A-Z _ - + ."),
        ({"completion_max_buffer": 0},
         "Invalid completion_max_buffer 0: input should be greater than or equal to 1"),
        ({"rank_timeout": 0},
         "Invalid rank_timeout 0: input should be greater than or equal to 1"),
        ({"log_dir": ""}, "Invalid log_dir: it is empty; name a directory, such as swanlog."),
        ({"rank_series": "some"}, "Invalid rank_series 'some': use a number of ranks, 'all' or 'none'"),
        ({"api_host": "swanlab.example.com"},
         "api_host: 'swanlab.example.com' is not a web address: write it as https://swanlab.example.com"),
    ],
)  # fmt: skip
def test_wrong_settings_are_one_sentence(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        ObserverSettings(**values)
    assert str(caught.value) == sentence


def test_environment_is_read_and_keywords_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWANLAB_PROJ_NAME", "from-env")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_API_KEY", "key-from-env")
    monkeypatch.setenv("SWANLAB_LARK_SECRET", "secret-from-env")
    monkeypatch.setenv("OBSERVER_RANK_SERIES", "all")
    settings = ObserverSettings(mode="local")
    assert (settings.project, settings.mode) == ("from-env", "local")
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "key-from-env"
    assert settings.rank_series > 1_000_000


def test_bad_environment_names_the_variable_s_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBSERVER_RANK_TIMEOUT", "soon")
    with pytest.raises(SettingsError, match=r"^Invalid rank_timeout 'soon'"):
        ObserverSettings(project="p")


def test_online_is_cloud() -> None:
    assert ObserverSettings(mode="online").mode == "cloud"


def test_a_project_turns_it_on_and_an_explicit_false_off() -> None:
    assert ObserverSettings(project="p").active
    assert not ObserverSettings(project="p", use_swanlab=False).active
    assert not ObserverSettings(project="p", mode="disabled").active


def test_secrets_show_nowhere_but_travel() -> None:
    settings = ObserverSettings(
        project="p",
        api_key="s3cret-1",
        lark_secret="s3cret-2",
        lark_webhook_url="http://x/open-apis/bot/v2/hook/s3cret-3",
    )
    assert "s3cret" not in repr(settings) + str(settings) + settings.model_dump_json()
    again: ObserverSettings = pickle.loads(pickle.dumps(settings))
    assert again.api_key is not None
    assert again.api_key.get_secret_value() == "s3cret-1"
    with pytest.raises(SettingsError) as caught:
        ObserverSettings(project="p", api_key=["s3cret-4"])
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("name", ["api_host", "web_host"])
def test_an_address_is_kept_without_what_may_be_a_secret_in_it(name: str) -> None:
    settings = ObserverSettings(project="p", **{name: "https://me:hunter22@swanlab.example:8443/sub?token=hunter22"})
    assert settings.public()[name] == "https://swanlab.example:8443/sub"
    assert "hunter22" not in repr(settings)
    with pytest.raises(SettingsError) as caught:
        ObserverSettings(project="p", **{name: "me:hunter22@swanlab.example"})
    assert "hunter22" not in str(caught.value)


def test_unwritable_log_dir_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"log_dir '.*file/logs' cannot be written \(.*file is not a directory\)"):
        check_writable(tmp_path / "file" / "logs")
    check_writable(tmp_path / "new" / "logs")


@pytest.mark.parametrize(
    "name", ["SWANLAB_MODE", "OBSERVER_RUN_ID", "OBSERVER_STRICT", "SWANLAB_WEB_HOST", "OBSERVER_ALERTS"]
)
def test_a_variable_of_blanks_says_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "  ")
    assert ObserverSettings(project="p") == ObserverSettings(project="p", mode="cloud")


@pytest.mark.parametrize("host", ["https://", "http://[::1", "https://h:99999", "https://h/a b", "https://:80"])
def test_an_address_names_a_host(host: str) -> None:
    with pytest.raises(SettingsError, match="api_host: it names no host and port"):
        ObserverSettings(project="p", api_host=host)
    assert ObserverSettings(project="p", api_host="http://[::1]:8080/api").api_host == "http://[::1]:8080/api"
