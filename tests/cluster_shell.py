"""What a launcher's script does: it is run where each program that it calls only notes how it was called, and the call
is parsed by that program's own parser."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

import click

BIN = Path(sys.executable).parent
"""Where pip has installed what the tests call."""
PROGRAM = ("train.py", "--note", "two words")
"""What the scripts are told to run."""
SETTINGS = {
    "HEAD": "192.0.2.1",
    "GPUS": "4",
    "RUN_NAME": "lora",
    "IMAGE": "/shared/train.sqsh",
    "RAY_API_SERVER_ADDRESS": "http://192.0.2.1:8265",
}
"""What a user sets."""
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_ON_NODE": "32",
    "SLURM_CPUS_PER_TASK": "32",
    "SLURM_SUBMIT_DIR": "/home/me/my job",
}
"""What Slurm tells a batch script on two nodes."""

# `srun` goes on with the command behind its options, which all have the form --NAME=VALUE.
STUB = """#!/bin/bash
name="${0##*/}"
printf '%s\\0' "$name" "${RAY_ADDRESS-}" "$@" > "$CALLS/$EPOCHREALTIME-$$"
if [[ $name == scontrol ]]; then echo n1; echo n2; fi
if [[ $name == srun ]]; then
  while [[ ${1-} == -* ]]; do shift; done
  exec "$@"
fi
"""
STUBS = ("torchrun", "ray", "srun", "scontrol", "axolotl", "python")
REAL = ("bash", "dirname", "sleep")


@dataclass(frozen=True)
class Call:
    """A program, and how it was called."""

    program: str
    ray_address: str
    arguments: tuple[str, ...]


def shellcheck(text: str, *options: str) -> Iterator[str]:
    """What it finds, of any severity."""
    done = subprocess.run(
        [BIN / "shellcheck", "--norc", "--format=gcc", *options, "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    yield from done.stdout.splitlines()


def put_stubs(directory: Path, *names: str) -> None:
    """Programs of these names, there."""
    for name in names:
        (directory / name).write_text(STUB)
        (directory / name).chmod(0o755)


def calls(path: Path, text: str, *arguments: str, **env: str) -> list[Call]:
    """Of a script with this text that lies there, in their order.

    Raises:
        ValueError: it fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        programs, noted = Path(directory, "programs"), Path(directory, "calls")
        programs.mkdir()
        noted.mkdir()
        put_stubs(programs, *STUBS)
        for name in REAL:
            (programs / name).symlink_to(str(shutil.which(name)))
        given = {"PATH": str(programs), "CALLS": str(noted), "HOME": directory} | SETTINGS | SLURM | env
        command = ["/bin/bash", "-c", text, str(path), *arguments]
        done = subprocess.run(command, env=given, capture_output=True, text=True, check=False, timeout=30)
        if done.returncode:
            raise ValueError(f"exit code {done.returncode}: {done.stderr}")
        return noted_calls(noted)


def noted_calls(directory: Path) -> list[Call]:
    """What the stubs have noted there."""
    noted = [file.read_text().split("\0")[:-1] for file in sorted(directory.iterdir())]
    return [Call(program, address, tuple(arguments)) for program, address, *arguments in noted]


def check(call: Call) -> None:
    """Raises ValueError for what the program would refuse."""
    _PARSERS[call.program](call.arguments)


class Strict(argparse.ArgumentParser):
    def __init__(self, **given: Any) -> None:
        super().__init__(allow_abbrev=False, add_help=False, **given)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def torchrun(arguments: Sequence[str]) -> argparse.Namespace:
    """By its own parser, and with values that it accepts only when it runs."""
    from torch.distributed.run import get_args_parser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed: argparse.Namespace = get_args_parser().parse_args(list(arguments))
    except SystemExit:
        raise ValueError(said.getvalue()) from None
    if parsed.nproc_per_node not in ("auto", "gpu", "cpu"):
        int(parsed.nproc_per_node)
    if not re.fullmatch(r"\d+(:\d+)?", parsed.nnodes):
        raise ValueError(f"--nnodes={parsed.nnodes}")
    if (parsed.rdzv_backend, bool(parsed.rdzv_endpoint)) not in (("static", False), ("c10d", True)):
        raise ValueError(f"--rdzv-backend={parsed.rdzv_backend} --rdzv-endpoint={parsed.rdzv_endpoint}")
    return parsed


def ray(arguments: Sequence[str]) -> None:
    """By its own commands."""
    from ray.scripts.scripts import cli

    command, left = cli, list(arguments)
    while isinstance(command, click.Group):
        name = left.pop(0)
        if name not in command.commands:
            raise ValueError(f"ray has no command {name}")
        command = command.commands[name]
    try:
        command.make_context(name, left)
    except click.ClickException as error:
        raise ValueError(error.format_message()) from None


def axolotl(arguments: Sequence[str]) -> None:
    """The commands that are used; tests/test_plugin.py asks Axolotl itself."""
    ours, _, launchers = " ".join(map(shlex.quote, arguments)).partition(" -- ")
    parser = Strict()
    parser.add_argument("command", choices=["preprocess", "train"])
    parser.add_argument("config")
    parser.add_argument("--launcher", choices=["torchrun", "accelerate", "python"])
    parser.add_argument("--use-ray", action="store_true")
    parsed = parser.parse_args(shlex.split(ours))
    if not parsed.config.endswith((".yaml", ".yml")):
        raise ValueError(f"{parsed.config} is no configuration")
    if parsed.launcher == "torchrun":
        torchrun([*shlex.split(launchers), "axolotl"])
    elif launchers:
        raise ValueError(f"who takes {launchers}?")


def srun(arguments: Sequence[str]) -> None:
    """The options that are used; Slurm itself is asked by tests/test_slurm.py, which has no pyxis."""
    parser = Strict()
    for name in ("nodes", "ntasks"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("nodelist", "exclude", "container-image", "container-mounts", "container-workdir"):
        parser.add_argument(f"--{name}", type=_not_empty)
    parser.add_argument("--overlap", action="store_true")
    mounts = parser.parse_args(list(takewhile(lambda argument: argument.startswith("-"), arguments))).container_mounts
    if mounts and not all(re.fullmatch(r"/[^:]*:/[^:]*(:[a-z+]+)?", mount) for mount in mounts.split(",")):
        raise ValueError(f"--container-mounts={mounts}")


def sbatch(text: str) -> Iterator[str]:
    """What is wrong with a batch script's own options: Slurm takes any other line for a comment."""
    parser = Strict()
    for name in ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("job-name", "output"):
        parser.add_argument(f"--{name}", type=_not_empty, required=True)
    comments, _, commands = text.partition("\nset ")
    if re.search(r"^#\s*SBATCH", commands, re.M):
        yield "options behind the first command are none"
    try:
        options = re.findall(r"^#SBATCH (.*)", comments, re.M)
        parsed = parser.parse_args([word for option in options for word in shlex.split(option, comments=True)])
    except ValueError as error:
        yield str(error)
    else:
        if parsed.ntasks_per_node != 1:
            yield "one task a node: it starts the node's ranks"


def _not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def _python(arguments: Sequence[str]) -> None:
    if not arguments or not arguments[0].endswith(".py"):
        raise ValueError(f"python {arguments}")


def _scontrol(arguments: Sequence[str]) -> None:
    if tuple(arguments) != ("show", "hostnames", SLURM["SLURM_JOB_NODELIST"]):
        raise ValueError(f"scontrol {arguments}")


_PARSERS: dict[str, Callable[[Sequence[str]], object]] = {
    "torchrun": torchrun,
    "ray": ray,
    "axolotl": axolotl,
    "srun": srun,
    "python": _python,
    "scontrol": _scontrol,
}
