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
_helps: int | None = None
_forked_from: int | None = None
_inherited_group = False


def note(helps: int | None = None) -> None:
    """This process is a connected rank, or helps that of another process."""
    global _helps
    _helps = helps
    os.environ[_NOTE] = f"{os.getpid()} {os.environ.get('RANK', '')}"


def forget_note() -> None:
    """It is a rank no more; what it starts from now on may be ranks."""
    if _helps is None and os.environ.get(_NOTE, "").partition(" ")[0] == str(os.getpid()):
        del os.environ[_NOTE]


def helped_rank() -> int | None:
    """The process whose worker this is; None if it is none's."""
    told, _, rank = os.environ.get(_NOTE, "").partition(" ")
    if not told.isdecimal() or rank != os.environ.get("RANK", "") or (_in_a_group() and not _inherited_group):
        return None
    if int(told) == os.getpid():
        return _helps
    return int(told) if int(told) in (_forked_from, _parent()) else None


def _parent() -> int | None:
    """The process that has started this one with multiprocessing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        return parent.pid
    # While a spawned process runs the script's first lines it has not been told its parent yet.
    return os.getppid() if getattr(multiprocessing.current_process(), "_inheriting", False) else None


def _in_a_group() -> bool:
    """Whether torch.distributed is initialised: workers do not do that."""
    distributed = sys.modules.get("torch.distributed")
    try:
        return distributed is not None and bool(distributed.is_available() and distributed.is_initialized())
    except Exception:  # it is just being imported
        return False


def after_fork() -> None:
    """In a child: remember what it has from its parent."""
    global _helps, _forked_from, _inherited_group
    _helps, _forked_from, _inherited_group = None, os.getppid(), _in_a_group()
