"""Processes that a connected rank has started to help it, such as a DataLoader's: they are no ranks, and log nothing.

A worker that is spawned runs the training's script from its first line, with the rank's environment, and so comes by a
``connect()`` that nothing guards. A rank notes itself in the environment while it is connected; a child that finds the
note is its worker, unless it has a rank of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import sys

_NOTE = "OBSERVER_CONNECTED"
_forked_from: int | None = None
_inherited_group = False


def note() -> None:
    """This process is a connected rank, or a worker of one."""
    os.environ[_NOTE] = f"{os.getpid()} {os.environ.get('RANK', '')}"


def forget_note() -> None:
    """It is no more; what it starts from now on may be ranks."""
    if os.environ.get(_NOTE, "").partition(" ")[0] == str(os.getpid()):
        del os.environ[_NOTE]


def helped_rank() -> int | None:
    """The process whose worker this is; None if it is none's."""
    told, _, rank = os.environ.get(_NOTE, "").partition(" ")
    if not told.isdecimal() or int(told) == os.getpid() or rank != os.environ.get("RANK", ""):
        return None
    parent = multiprocessing.parent_process()
    started_by = {_forked_from, None if parent is None else parent.pid}
    if int(told) not in started_by or (_in_a_group() and not _inherited_group):
        return None
    return int(told)


def _in_a_group() -> bool:
    """Whether torch.distributed is initialised: workers do not do that."""
    distributed = sys.modules.get("torch.distributed")
    try:
        return distributed is not None and bool(distributed.is_available() and distributed.is_initialized())
    except Exception:  # it is just being imported
        return False


def after_fork() -> None:
    """In a child: remember what it has from its parent."""
    global _forked_from, _inherited_group
    _forked_from, _inherited_group = os.getppid(), _in_a_group()
