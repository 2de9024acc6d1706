"""``connect()`` and ``current()``: the one observer of this process."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import Any

from swanlab_ray.actors.settings import ObserverSettings, SettingsError, check_writable
from swanlab_ray.observer.agent.choice import RankLink
from swanlab_ray.observer.job.identity import (
    Identity,
    check_run_id,
    identify,
)
from swanlab_ray.observer.job.which_run import forget_runs, warn_of_joining, which_run
from swanlab_ray.observer.observer import Observer
from swanlab_ray.observer.ray_cluster import patches
from swanlab_ray.observer.script import workers
from swanlab_ray.observer.script.notices import say_again, warn_once
from swanlab_ray.observer.timing import spans
from swanlab_ray.observer.unobserved import DisabledObserver, WorkerObserver

_current: Observer | None = None
_connecting = threading.RLock()


def connect(settings: ObserverSettings | None = None, **overrides: Any) -> Observer:
    """Connect this rank to the run's writer; the same call on every rank.

    Returns at once: Ray is found or started in the background, and what is logged meanwhile waits in memory. A second
    call returns the observer of the first one until that is finished; after that it begins another run, unless a run id
    is set.

    Args:
        settings: see :class:`ObserverSettings`; by default read from the environment.
        overrides: fields of the settings, instead of ``settings``.

    Raises:
        SettingsError: a setting is wrong. Problems that come later never raise, unless ``strict=True``.
    """
    if settings is not None and overrides:
        raise SettingsError(f"Pass either settings or keywords to connect(), not both (got {', '.join(overrides)}).")
    if settings is None:
        settings = ObserverSettings(**overrides)
    elif not isinstance(settings, ObserverSettings):
        raise SettingsError(f"connect() takes an ObserverSettings, not {type(settings).__name__}: pass its fields.")
    try:
        with _connecting:  # else two threads would each report as this rank
            return _connect(settings)
    except SettingsError:
        raise
    except Exception as error:
        if settings.strict:
            raise
        return _unobserved(settings, f"{type(error).__name__}: {error}")


def _connect(settings: ObserverSettings) -> Observer:
    if _current is not None and not (isinstance(_current, DisabledObserver) and settings.active):
        if settings != _current.settings:
            joined = _current.settings.experiment_name or _current.run_id
            warn_of_joining(_current.settings, joined, settings)
        return _current
    if not settings.active:
        if settings.mode != "disabled" and "use_swanlab" not in settings.model_fields_set:
            raise SettingsError("No project is set: pass project='my-project' or set SWANLAB_PROJ_NAME.")
        return _begin(DisabledObserver(settings, _identity_if_known()))
    rank_pid = workers.helped_rank()
    if rank_pid is not None:
        workers.note(rank_pid)  # for workers of its own
        return _begin(WorkerObserver(settings, _identity_if_known(), rank_pid))
    identity = identify()
    try:
        if not settings.log_dir.is_absolute() or (
            identity.nodes == 1 and not identity.in_ray_train and not os.environ.get("RAY_ADDRESS")
        ):
            check_writable(settings.log_dir)  # elsewhere the writer's machine is another one, and says so itself
    except SettingsError as error:
        if settings.strict or settings.log_dir.is_absolute():
            raise
        return _unobserved(settings, str(error))  # nobody has set it: the working directory was removed
    check_run_id(settings, identity)
    identity = replace(identity, run=which_run(settings, identity))
    say_again()
    observer = _begin(Observer(settings, identity, RankLink(settings, identity)))
    spans.active = observer.spans
    workers.note()
    if settings.strict:
        observer.require_ready()
    return observer


def _begin(observer: Observer) -> Observer:
    global _current
    observer._on_finish = _forget
    _current = observer
    return observer


def _unobserved(settings: ObserverSettings, reason: str) -> Observer:
    warn_once("unobserved", f"This rank is not observed; the training goes on. {reason}")
    spans.active = None
    return _begin(DisabledObserver(settings, _identity_if_known()))


def _identity_if_known() -> Identity:
    try:
        return identify()
    except Exception:
        return Identity(0, 1, 0, 1)


def current() -> Observer | None:
    """The connected observer of this process, if there is one."""
    return _current


def _forget(observer: Observer) -> None:
    global _current
    if _current is observer:
        _current = spans.active = None
        workers.forget_note()


def _after_fork() -> None:
    global _current, _connecting
    observer, _current = _current, None
    _connecting = threading.RLock()  # it may be held by a thread that only the parent has
    spans.active = None
    forget_runs()
    workers.after_fork()
    if observer is not None and not isinstance(observer, DisabledObserver):
        observer._forked()
        patches.forget_exit_handler()


os.register_at_fork(after_in_child=_after_fork)
