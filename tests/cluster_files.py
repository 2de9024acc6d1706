"""What is wrong with a file that people copy: the tests' own checks, by which it stands and its mutants fall."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Hashable, Iterator
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import yaml

from tests import cluster_ray, cluster_shell
from tests.cluster_manifests import KINDS, RAY, ROOT, SETTINGS

CONFIGS = ROOT / "cluster_configs"
FILES = sorted(file for file in CONFIGS.rglob("*") if file.is_file() and file.name != "README.md")


_SLURM = {
    "nnodes": "2",
    "nproc_per_node": "8",
    "rdzv_id": "4711",
    "rdzv_backend": "c10d",
    "rdzv_endpoint": "n1:24711",
}
_TWO_NODES = {
    "nnodes": "2",
    "nproc_per_node": "4",
    "rdzv_id": "lora",
    "rdzv_backend": "static",
    "master_addr": "192.0.2.1",
    "master_port": 29500,
}
"""What torchrun shall be told by the scripts, with the settings that they are given."""


def problems(path: Path, text: str) -> Iterator[str]:
    """What the checks for a file at this place say of this text; nothing where it is right."""
    try:
        yield from _everywhere(path, text)
        yield from _CHECKS[path.suffix](path, text)
    except Exception as error:
        yield f"{type(error).__name__}: {error}"


def _everywhere(path: Path, text: str) -> Iterator[str]:
    for name in set(re.findall(r"\b(?:OBSERVER|SWANLAB)_[A-Z_]+", text)) - SETTINGS:
        yield f"nothing reads {name}"
    extras = set(metadata("swanlab-ray").get_all("Provides-Extra") or [])
    for given in re.findall(r"(?:whl\)|'\.)\[([^]]*)\]", text):
        for extra in set(given.split(",")) - extras:
            yield f"there is no extra {extra}"
    for name in re.findall(r"(?<![\w/-])(\.\./[\w./-]+\w)", text):
        if not (path.parent / name).exists():
            yield f"there is no {name}"


def _script(path: Path, text: str) -> Iterator[str]:
    if path.suffix == ".sbatch":
        yield from cluster_shell.sbatch(text)
    yield from cluster_shell.shellcheck(text)
    arguments = ("config.yaml",) if path.stem == "axolotl" else cluster_shell.PROGRAM
    for rank in ("0", "1") if path.parent.name == "torchrun" else ("0",):
        calls = cluster_shell.calls(path, text, *arguments, NODE_RANK=rank)
        for call in calls:
            cluster_shell.check(call)
        yield from _of_all(path, calls)


def _of_all(path: Path, calls: list[cluster_shell.Call]) -> Iterator[str]:
    """What the calls of one script make together."""
    told = [call.arguments for call in calls if call.arguments[-3:] == cluster_shell.PROGRAM]
    if path.stem != "axolotl" and not told:
        yield "the program is not run, or not with its arguments"
    for call in calls:
        if call.program == "torchrun":
            launched = vars(cluster_shell.torchrun(call.arguments))
            if not (_SLURM if path.parent.name == "slurm" else _TWO_NODES).items() <= launched.items():
                yield f"{call} is not what was asked for"
    heads = {cluster_shell.SETTINGS["HEAD"] + ":6379", "n1:24711"}
    if any(call.program == "ray" and "start" in call.arguments for call in calls):
        yield from (
            f"{call} looks for Ray elsewhere"
            for call in calls
            if call.program in ("torchrun", "python") and call.ray_address not in heads
        )


class _NoTwice(yaml.CSafeLoader):
    """A loader that refuses a key that stands there twice, where YAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise yaml.constructor.ConstructorError(None, None, f"a key stands here twice: {keys}", node.start_mark)
        return super().construct_mapping(node, deep)


def _yaml(path: Path, text: str) -> Iterator[str]:
    written = yaml.load(text, _NoTwice)
    if path.parent.name == "kubernetes":
        KINDS[written["kind"]].model_validate(written)
    elif path.parent.name == "axolotl":
        cluster_ray.axolotl(written)
    elif path.stem == "runtime_env":
        cluster_ray.runtime_environment(written)
    else:
        yield from cluster_ray.launcher(written)


def _dockerfile(path: Path, text: str) -> Iterator[str]:
    """By hadolint, which asks shellcheck about what is run; and by what the checkout has."""
    linted = subprocess.run(
        [cluster_shell.BIN / "hadolint", "--no-color", "-"], input=text, capture_output=True, text=True, check=False
    )
    yield from (linted.stdout + linted.stderr).splitlines()
    instructions = re.sub(r"\\\n\s*", " ", text)
    if f"FROM rayproject/ray:{RAY}-py311-gpu" not in text.splitlines():
        yield "the base has another Ray than constraints.txt"
    copied = {
        name for line in re.findall(r"^COPY --chown=1000:100 (.*)", instructions, re.M) for name in line.split()[:-1]
    }
    yield from (f"there is no {name}" for name in copied if not (ROOT / name).exists())
    needed = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "py.typed", "actors", "observer", "plugin"}
    yield from (f"{name} is not copied" for name in {*needed, "docs/examples"} - copied)
    for command in re.findall(r"^RUN (.*)", instructions, re.M):
        _run(shlex.split(command), copied)


def _run(words: list[str], copied: set[str]) -> None:
    """Raises ValueError where one of the image's commands is none of those that are meant."""
    if words[0] == "mkdir":
        return
    pip = cluster_shell.Strict()
    pip.add_argument("program", choices=["pip"])
    pip.add_argument("command", choices=["install"])
    pip.add_argument("--no-cache-dir", action="store_true")
    pip.add_argument("--constraint", choices=copied)
    pip.add_argument("what")
    pip.parse_args(words)


_CHECKS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".sh": _script,
    ".sbatch": _script,
    ".yaml": _yaml,
    "": _dockerfile,
}
