"""The descriptors that everybody prints to."""

from __future__ import annotations

import os


def occupy_standard_descriptors() -> None:
    """Where standard input, output or error are closed, sockets of ours would get their numbers, and all that anybody
    prints would go into them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
