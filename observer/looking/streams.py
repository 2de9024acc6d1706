"""Standard output as a command finds it: closed, full, a pipe without a reader, of an encoding that lacks a letter."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from swanlab_ray.observer.looking.render import shown

PIPE_CLOSED = 141
"""The exit code of what a shell sees ended by SIGPIPE."""


class Command(click.Group):
    """A command that ends as those of Unix do: quietly where nobody reads on, else with one sentence."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run it."""
        with _told():
            return super().main(*arguments, **options)


@contextmanager
def _told() -> Iterator[None]:
    """Around everything that a command does and prints."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _let_go()
        sys.exit(PIPE_CLOSED)
    except OSError as error:
        _let_go()
        with suppress(OSError):
            click.echo(f"Error: {shown(_sentence(error))}.", err=True)
        sys.exit(1)


def _sentence(error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.filename is not None:
        return f"'{error.filename}' cannot be used: {reason}"
    if isinstance(error, FileNotFoundError):
        return "The working directory does not exist any more"
    if error.errno is None:  # not the system's, but somebody's sentence
        return reason.rstrip(".")
    return f"The output cannot be written: {reason}"


def _let_go() -> None:
    """What is left of the output goes nowhere: the interpreter would complain of it once more at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
