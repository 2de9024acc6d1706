"""The keys of an Axolotl YAML: the observer's settings, under the names of Axolotl's own SwanLab integration."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, Field, SecretStr, create_model, model_validator

from swanlab_ray.actors.settings import ObserverSettings, SettingsError
from swanlab_ray.plugin import driver

_SWANLAB = (
    "project",
    "experiment_name",
    "description",
    "mode",
    "workspace",
    "api_key",
    "web_host",
    "api_host",
    "log_model",
    "lark_webhook_url",
    "lark_secret",
    "log_completions",
    "completion_log_interval",
    "completion_max_buffer",
)


def _key(name: str) -> str:
    if name == "use_swanlab":
        return name
    return f"swanlab_{name}" if name in _SWANLAB else f"observer_{name}"


NO_PROJECT = (
    "SwanLab enabled but 'swanlab_project' is not set: add 'swanlab_project: my-project', or "
    "'use_swanlab: false' to do without."
)
_OURS = re.compile("(use_)?swan_?lab|observer_")

KEYS = {_key(name): name for name in ObserverSettings.model_fields}
"""YAML keys and the fields of :class:`ObserverSettings` they set."""
SECRETS = tuple(key for key, name in KEYS.items() if name in ("api_key", "lark_webhook_url", "lark_secret"))


def settings_from(cfg: Mapping[str, Any]) -> ObserverSettings:
    """The observer's settings of a configuration; what it does not say comes from the environment.

    Raises:
        SettingsError: a key or a value is wrong, or no project is named.
    """
    for key in map(str, cfg):
        alike = key.lower().replace("-", "_")
        if _OURS.match(alike) and key not in KEYS and key != driver.KEY:
            close = difflib.get_close_matches(alike, KEYS, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(KEYS)}."
            raise SettingsError(f"Unknown key '{key}': {hint}")
    told = driver.unpack(cfg)
    if told is not None:
        return ObserverSettings(**told.settings)
    given = {name: cfg[key] for key, name in KEYS.items() if cfg.get(key) is not None}
    try:
        settings = ObserverSettings(**given)
    except SettingsError as error:
        raise SettingsError(NO_PROJECT if "is not set" in str(error) else _with_keys(str(error))) from None
    if not settings.use_swanlab and "use_swanlab" not in settings.model_fields_set and settings.mode != "disabled":
        raise SettingsError(NO_PROJECT)
    return settings


def _with_keys(sentence: str) -> str:
    """A sentence about a setting, with the key that people have written."""
    for key, name in KEYS.items():
        if sentence.startswith((f"Invalid {name} ", f"Invalid {name}:", f"{name}: ")):
            return sentence.replace(name, key, 1)
    return sentence


def is_listed(plugins: Iterable[Any] | None) -> bool:
    """Whether a configuration asks for this plugin."""
    return any(str(name).endswith(".SwanLabRayPlugin") for name in plugins or ())


class _Checked(BaseModel):
    """Checks the keys below as the observer does."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if hasattr(self, "plugins") and not is_listed(self.plugins):
            return self  # Axolotl merges the schemas of all plugins that it ever loaded
        settings_from({key: getattr(self, key) for key in (*KEYS, driver.KEY)})
        return self


_WRITTEN: dict[str, Any] = {"mode": str, "alerts": list[str] | str, "rank_series": int | str, "log_dir": str}
"""Types in a YAML, where they are not those of the settings."""


def _field(name: str) -> Any:
    setting = ObserverSettings.model_fields[name]
    default = "" if setting.default is None else f" Default: {setting.default!s}."
    description = f"{setting.description}{default}".replace("``", "`")
    kind: Any = _WRITTEN.get(name, setting.annotation)
    return kind | None, Field(default=None, description=description)


_FIELDS: dict[str, Any] = {key: _field(name) for key, name in KEYS.items()}
_FIELDS[driver.KEY] = SecretStr | None, Field(default=None, description="Set by the driver for Ray workers.")

SwanLabRayArgs = create_model(
    "SwanLabRayArgs",
    __base__=_Checked,
    __doc__="Keys of the plugin in an Axolotl YAML. For one that is None the environment decides, else the default.",
    **_FIELDS,
)
