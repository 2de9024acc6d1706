"""Axolotl's hooks: read the configuration, and give the trainer the observer's callback."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import yaml
from axolotl.integrations.base import BasePlugin
from pydantic import SecretStr

from swanlab_ray.actors.settings import ObserverSettings, SettingsError
from swanlab_ray.observer.encoding.redact import plain
from swanlab_ray.observer.job.identity import identify
from swanlab_ray.observer.script.ending import headline
from swanlab_ray.observer.script.notices import logger, speak_up
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

    _latest: ClassVar[Any] = None
    """The callback of the latest training of this process."""

    def __init__(self) -> None:
        super().__init__()
        self._listed = False
        self._settings: ObserverSettings | None = None
        self._yaml: str | None = None
        self._saved = False

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
        self._listed = args.is_listed(plugins)
        if not self._listed:
            return  # Axolotl asks every plugin that it ever loaded
        speak_up()
        if BUILT_IN in plugins:
            raise SettingsError(f"Two plugins for SwanLab: remove {BUILT_IN} from 'plugins'; its keys stay.")
        for key in args.SECRETS:  # before Axolotl prints them
            if isinstance(cfg.get(key), str):
                cfg[key] = SecretStr(cfg[key])
        place = identify()
        if not place.in_ray_train:  # of an earlier training with the same configuration
            cfg.pop(driver.KEY, None)
        settings = args.settings_from(cfg)
        told = driver.unpack(cfg)
        self._yaml = told.yaml if told else _redacted(cfg.get("axolotl_config_path"))
        if not settings.active:
            return
        _check_installed()
        self._settings = settings
        if told is None and place.rank == 0:
            loggers.warn_of_several(cfg)
            settings = _with_login(settings)
            if settings.mode == "cloud" and settings.api_key is None:
                logger.warning(NO_KEY)
            if cfg.get("use_ray"):
                cfg[driver.KEY] = driver.pack(settings, self._yaml)

    def pre_model_load(self, cfg: Any) -> None:
        """Keep secrets out of the model card, to which Axolotl copies its YAML, and out of what other trackers save.

        They act on each node's first rank.
        """
        path = Path(cfg.get("axolotl_config_path") or "")
        if not self._listed or not path.is_file() or identify().local_rank != 0:
            return
        try:
            cfg["axolotl_config_path"] = self._without_secrets(path, Path(cfg["output_dir"]))
        except Exception as error:  # a full disk, a directory that is not ours: the training's own error is to come
            cfg["axolotl_config_path"] = None  # whatever is in there
            logger.warning(f"The model card will not show the YAML: {headline(error)}.")

    def _without_secrets(self, path: Path, output: Path) -> str | None:
        """The YAML, or where it holds secrets a copy without them; None where it could not be read before."""
        if self._yaml is None:
            return None
        if yaml.safe_load(path.read_text(encoding="utf-8")) == yaml.safe_load(self._yaml):
            return str(path)
        output.mkdir(parents=True, exist_ok=True)
        redacted = output / "axolotl_config.redacted.yml"
        new = redacted.with_suffix(f".{os.getpid()}")  # nodes may share the directory
        new.write_text(self._yaml, encoding="utf-8")
        new.replace(redacted)
        return str(redacted)

    def add_callbacks_pre_trainer(self, cfg: Mapping[str, Any], model: Any) -> list[Any]:
        """The observer's callback, for every rank's trainer."""
        if self._settings is None:
            return []
        from swanlab_ray.observer.callback import ObserverCallback

        self._close()  # an earlier training that did not come to its end
        place = identify()
        if place.rank == 0:
            logger.info(f"SwanLab initialized for project: {self._settings.project}")
            if place.world_size > 1:
                logger.info(
                    f"Distributed training detected (world_size={place.world_size}); SwanLab mode: "
                    f"{self._settings.mode}; every rank reports, and one writer keeps one run"
                )
        config = {"axolotl": _effective(cfg), "axolotl_yaml": self._yaml}
        type(self)._latest = ObserverCallback(self._settings, config)
        self._saved = False
        return [self._latest]

    def post_train(self, cfg: Mapping[str, Any], model: Any) -> None:
        """Called twice: before the model is saved, and after that. What fails in between is a failure."""
        observer = getattr(self._latest, "observer", None)
        if observer is not None and observer.result[0] in ("success", None):
            observer.set_result("success" if self._saved else None)
            self._saved = True

    def post_train_unload(self, cfg: Mapping[str, Any]) -> None:
        """The training has ended well: close the run before the process does whatever else it has to do."""
        self._close()

    @classmethod
    def _close(cls) -> None:
        observer, cls._latest = getattr(cls._latest, "observer", None), None
        if observer is not None and not observer.finished:
            state, error = observer.result
            observer.finish(state or "aborted", error or (None if state else "the training did not come to its end"))


def _redacted(path: str | None) -> str | None:
    """A YAML as text, without secrets; None if it cannot be read."""
    try:
        written = yaml.safe_load(Path(path or "").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return yaml.safe_dump(plain(written), sort_keys=False, allow_unicode=True)


def _effective(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What Axolotl made of the YAML, its defaults and the command line."""
    return {key: value for key, value in plain(cfg).items() if key != driver.KEY}


def _check_installed() -> None:
    """Axolotl goes on without a plugin that cannot be imported; a run that nobody records would be worse."""
    for package in ("ray", "swanlab"):
        if find_spec(package) is None:
            raise SettingsError(f"{package} is not installed: pip install {package}, or set 'use_swanlab: false'.")


def _with_login(settings: ObserverSettings) -> ObserverSettings:
    """With the API key of `swanlab login` on this machine, where no other is given: Ray's workers have none."""
    if settings.mode != "cloud" or settings.api_key is not None:
        return settings
    from swanlab import Settings

    key = Settings().api_key
    return settings.model_copy(update={"api_key": SecretStr(key)}) if key else settings
