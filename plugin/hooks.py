"""Axolotl's hooks: read the configuration, and give the trainer the observer's callback."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from axolotl.integrations.base import BasePlugin
from pydantic import SecretStr

from swanlab_ray.actors.settings import ObserverSettings, SettingsError
from swanlab_ray.observer.identity import identify
from swanlab_ray.observer.notices import logger, speak_up
from swanlab_ray.observer.redact import plain
from swanlab_ray.plugin import args, driver, loggers

BUILT_IN = "axolotl.integrations.swanlab.SwanLabPlugin"
NO_KEY = (
    "SwanLab cloud mode enabled but no API key found. Either set the environment variable "
    "(export SWANLAB_API_KEY=your-api-key), or add 'swanlab_api_key: your-api-key' to the config (less secure), or run "
    "`swanlab login` before training, or use 'swanlab_mode: local' for offline tracking. Until then the run is kept in "
    "the journal."
)


class SwanLabRayPlugin(BasePlugin):
    """Every rank of an Axolotl training reports to one writer, which keeps one SwanLab run.

    Under accelerate and torchrun each rank reads the YAML and its environment. Under Ray the driver reads them, and
    what it knows travels to the workers in the configuration. A run begins with the training, so that preprocessing
    leaves none behind.
    """

    def __init__(self) -> None:
        super().__init__()
        self._settings: ObserverSettings | None = None
        self._yaml = ""
        self._callback: Any = None

    def get_input_args(self) -> str:
        """The schema of the plugin's keys."""
        return f"{args.__name__}.SwanLabRayArgs"

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the configuration, and say what is wrong with it in one sentence.

        Raises:
            SettingsError: it cannot work.
        """
        self._settings = None
        plugins = cfg.get("plugins") or []
        if not any(name.endswith(f".{type(self).__name__}") for name in plugins):
            return  # Axolotl asks every plugin that it ever loaded
        speak_up()
        if BUILT_IN in plugins:
            raise SettingsError(
                f"Two plugins for SwanLab: remove {BUILT_IN} from 'plugins', its keys stay as they are."
            )
        for key in args.SECRETS:  # before Axolotl prints them
            if isinstance(cfg.get(key), str):
                cfg[key] = SecretStr(cfg[key])
        settings = args.settings_from(cfg)
        told = driver.unpack(cfg)
        self._yaml = told.yaml if told else _redacted(cfg.get("axolotl_config_path"))
        if not settings.active:
            return
        _check_installed()
        self._settings = settings
        if told is None and cfg.get("use_ray"):
            cfg[driver.KEY] = driver.pack(settings, self._yaml)
        if told is None and os.environ.get("RANK", "0") == "0":
            loggers.warn_of_several(cfg)
            _warn_without_key(settings)

    def pre_model_load(self, cfg: Mapping[str, Any]) -> None:
        """Keep secrets out of the model card, to which Axolotl copies its YAML, and out of what other trackers save."""
        if self._settings is None or not self._yaml or identify().rank != 0:
            return
        path = Path(cfg["axolotl_config_path"])
        if path.is_file() and yaml.safe_load(path.read_text(encoding="utf-8")) != yaml.safe_load(self._yaml):
            output = Path(cfg["output_dir"])
            output.mkdir(parents=True, exist_ok=True)
            redacted = output / "axolotl_config.redacted.yml"
            redacted.write_text(self._yaml, encoding="utf-8")
            cfg["axolotl_config_path"] = str(redacted)  # type: ignore[index]

    def add_callbacks_pre_trainer(self, cfg: Mapping[str, Any], model: Any) -> list[Any]:
        """The observer's callback, for every rank's trainer."""
        if self._settings is None:
            return []
        from swanlab_ray.observer.callback import ObserverCallback

        place = identify()
        if place.rank == 0:
            logger.info(f"SwanLab initialized for project: {self._settings.project}")
            if place.world_size > 1:
                logger.info(
                    f"Distributed training detected (world_size={place.world_size}); SwanLab mode: "
                    f"{self._settings.mode}; every rank reports, and one writer keeps one run"
                )
        self._callback = ObserverCallback(
            self._settings, config={"axolotl": _effective(cfg), "axolotl_yaml": self._yaml}
        )
        return [self._callback]

    def post_train_unload(self, cfg: Mapping[str, Any]) -> None:
        """The training has ended well: close the run before the process does whatever else it has to do."""
        observer, self._callback = getattr(self._callback, "observer", None), None
        if observer is not None:
            observer.finish()


def _redacted(path: str | None) -> str:
    """A YAML as text, without secrets."""
    try:
        written = yaml.safe_load(Path(path or "").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return ""
    return yaml.safe_dump(plain(written), sort_keys=False, allow_unicode=True)


def _effective(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What Axolotl made of the YAML, its defaults and the command line."""
    return {key: value for key, value in plain(cfg).items() if key != driver.KEY}


def _check_installed() -> None:
    """Axolotl goes on without a plugin that cannot be imported; a run that nobody records would be worse."""
    for package in ("ray", "swanlab"):
        if find_spec(package) is None:
            raise SettingsError(f"{package} is not installed: pip install {package}, or set 'use_swanlab: false'.")


def _warn_without_key(settings: ObserverSettings) -> None:
    if settings.mode != "cloud" or settings.api_key is not None:
        return
    from swanlab import Settings

    if not Settings().api_key:  # neither a variable nor a login
        logger.warning(NO_KEY)
