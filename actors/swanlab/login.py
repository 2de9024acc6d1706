"""Which cloud, and with which key: as SwanLab's client finds them, in this order: settings, its files, the environment,
`swanlab login`, its default. A key of a login is for the host of that login only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic_settings import EnvSettingsSource, PydanticBaseSettingsSource

from swanlab_ray.actors.settings import ObserverSettings, untidy
from swanlab_ray.actors.swanlab import sdk


class Account(NamedTuple):
    """A key and the host that it was given for."""

    api_key: str | None
    api_host: str
    web_host: str


def find_account(settings: ObserverSettings) -> Account:
    """The account that these settings use on this machine. Reads the environment and leaves it as it is."""
    from swanlab import Settings

    class Tidy(Settings):
        @classmethod
        def settings_customise_sources(cls, *classes: Any, **given: Any) -> tuple[PydanticBaseSettingsSource, ...]:
            sources: tuple[PydanticBaseSettingsSource, ...] = super().settings_customise_sources(*classes, **given)
            for source in sources:
                if isinstance(source, EnvSettingsSource):
                    variables = source.env_vars.items()
                    source.env_vars = {name: value for name, value in variables if not untidy(name, value)}
            return sources

    given = {"api_host": settings.api_host, "web_host": settings.web_host}
    if settings.api_key is not None:
        given["api_key"] = settings.api_key.get_secret_value()
    found = Tidy(mode="online", **{name: value for name, value in given.items() if value})
    return Account(found.api_key or None, found.api_host, found.web_host)


def same_host(one: str, other: str) -> bool:
    """Whether two addresses are those of the same host."""
    return sdk.host_of(one) == sdk.host_of(other)
