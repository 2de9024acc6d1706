"""Settings and versions that differ between ranks: the writer goes by those of the rank that came first."""

from __future__ import annotations

from typing import Any

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.messages import Hello
from swanlab_ray.actors.wire.version import package_version

OF_A_RANK = ("run_id", "log_dir", "strict", "use_swanlab", "log_model", "cuda_spans", "node_interval", "dashboard")
"""Settings that each rank goes by itself, or that name a place as its own machine sees it."""
SHOWN = 60
"""Characters of a value that are shown."""


class Differences:
    """Looks at what each rank was given. Each name is told once.

    Args:
        settings: those that the run goes by.
    """

    def __init__(self, settings: ObserverSettings) -> None:
        self._settings = settings.public()
        self._told: set[str] = set()

    def look(self, hello: Hello) -> list[str]:
        """What there is to tell of a rank, in sentences."""
        sentences: list[str] = []
        if hello.version not in ("", package_version()) and self._new("version"):
            sentences.append(
                f"Rank {hello.rank} ({hello.host}) runs version {hello.version} of swanlab-ray, the writer "
                f"{package_version()}: install the same on all machines."
            )
        given = hello.settings if hello.settings is not None else self._settings
        names = sorted((self._settings.keys() | given.keys()) - set(OF_A_RANK))
        if hello.version != package_version():  # which may not know all of them
            names = sorted(self._settings.keys() & given.keys() - set(OF_A_RANK))
        found = [name for name in names if self._settings.get(name) != given.get(name) and self._new(name)]
        if found:
            each = ", ".join(
                f"{name} {_shown(given.get(name))} not {_shown(self._settings.get(name))}" for name in found
            )
            sentences.append(
                f"Rank {hello.rank} ({hello.host}) was given other settings than the run goes by: {each}. Give all "
                "ranks the same; those of the rank that came first count."
            )
        return sentences

    def _new(self, name: str) -> bool:
        if name in self._told:
            return False
        self._told.add(name)
        return True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
