"""Which disk a directory is on, and whether other machines have it too."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

OF_ONE_MACHINE = (
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "bcachefs"),
    *("tmpfs", "ramfs", "overlay", "fuse.fuse-overlayfs"),
)


def nearest(path: Path) -> Path:
    """It, or what of the directories around it exists."""
    return next(one for one in (path, *path.parents) if one.exists())


def file_system(path: Path) -> str:
    """Its kind, such as ``ext4``; empty where that is not to be found out."""
    real = Path(os.path.realpath(nearest(path)))
    mounts = {one.mountpoint: one.fstype for one in psutil.disk_partitions(all=True)}
    return next((mounts[str(one)] for one in (real, *real.parents) if str(one) in mounts), "")


def told_of_one_machine(path: Path, host: str) -> str | None:
    """What to say of a run of several machines that lies there, on this host's own disk; None: on a shared one, or that
    is not known."""
    try:
        kind = file_system(path)
    except Exception:  # of whatever psutil finds in odd containers; a run does not depend on it
        return None
    if kind not in OF_ONE_MACHINE:
        return None
    return (
        f"The run lies on the disk of {host} alone ({path}, {kind}): with that machine goes what SwanLab's cloud does "
        "not have. Name a shared disk with log_dir to keep it."
    )
