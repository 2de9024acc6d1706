"""What the driver of a Ray job tells the workers, who have neither its environment nor its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, SecretStr

from swanlab_ray.actors.settings import ObserverSettings

KEY = "observer_from_driver"
"""Key of the configuration under which it travels; a secret, so that Axolotl does not print it."""


class FromDriver(BaseModel):
    """What was known on the driver."""

    settings: dict[str, Any]
    """Fields of :class:`ObserverSettings`: those of the YAML and of the driver's environment."""
    yaml: str | None
    """The YAML, without secrets; None if it could not be read."""


def pack(settings: ObserverSettings, yaml: str | None) -> SecretStr:
    """For ``cfg[KEY]``. Paths are absolute: the workers have another working directory."""
    known = settings.model_fields_set | {"log_dir"}
    values = {name: getattr(settings, name) for name in known}
    plain = {
        name: value.get_secret_value() if isinstance(value, SecretStr) else value for name, value in values.items()
    }
    return SecretStr(FromDriver(settings=plain, yaml=yaml).model_dump_json())


def unpack(cfg: Mapping[str, Any]) -> FromDriver | None:
    """What the driver has put into the configuration; None on the driver itself, and without Ray."""
    packed = cfg.get(KEY)
    return FromDriver.model_validate_json(packed.get_secret_value()) if isinstance(packed, SecretStr) else None
