"""What runs in a rank: connect, log, and callbacks for trainers.

Names are loaded when they are used, so that ``import swanlab_ray.observer`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swanlab_ray.actors.settings import ObserverSettings, SettingsError
    from swanlab_ray.observer.callback import ObserverCallback
    from swanlab_ray.observer.history.upload import sync
    from swanlab_ray.observer.observer import Observer
    from swanlab_ray.observer.session import connect, current
    from swanlab_ray.observer.tracker import ObserverTracker

_HOMES = {
    "ObserverSettings": "swanlab_ray.actors.settings",
    "SettingsError": "swanlab_ray.actors.settings",
    "ObserverCallback": "swanlab_ray.observer.callback",
    "Observer": "swanlab_ray.observer.observer",
    "connect": "swanlab_ray.observer.session",
    "current": "swanlab_ray.observer.session",
    "ObserverTracker": "swanlab_ray.observer.tracker",
    "sync": "swanlab_ray.observer.history.upload",
}

__all__ = [
    "Observer",
    "ObserverCallback",
    "ObserverSettings",
    "ObserverTracker",
    "SettingsError",
    "connect",
    "current",
    "sync",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
