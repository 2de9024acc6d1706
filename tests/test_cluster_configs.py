"""The files people copy: they parse, and name things that exist."""

from __future__ import annotations

import json
import re
import subprocess
from importlib.metadata import metadata
from pathlib import Path

import click
import pytest
import yaml

CONFIGS = Path(__file__).parents[1] / "cluster_configs"
SCRIPTS = sorted([*CONFIGS.rglob("*.sh"), *CONFIGS.rglob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_long_options_exist(script: Path) -> None:
    """Every option given to ``ray start`` and ``torchrun`` is one that they know."""
    from ray.scripts.scripts import start
    from torch.distributed.run import get_args_parser

    helps = start.get_help(click.Context(start)) + get_args_parser().format_help()
    text = re.sub(r"\\\n\s*", " ", script.read_text())
    commands = [line for line in text.splitlines() if re.search(r"ray start|torchrun --|ray_options=", line)]
    assert commands
    for line in commands:
        called = line[re.search(r"ray start|torchrun|ray_options", line).start() :]  # type: ignore[union-attr]
        for option in re.findall(r"--[a-z][a-z-]+", called):
            assert option in helps or option.replace("-", "_") in helps, option


def test_ray_cluster_is_valid() -> None:
    """By Ray's own schema, with its defaults filled in as ``ray up`` does."""
    import ray.autoscaler
    from jsonschema import validate  # type: ignore[import-untyped]

    config = yaml.safe_load((CONFIGS / "ray" / "cluster.yaml").read_text())
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    validate(config, schema)


def test_named_extras_exist() -> None:
    extras = set(metadata("swanlab-ray").get_all("Provides-Extra") or [])
    for file in CONFIGS.rglob("*"):
        for names in re.findall(r"swanlab-ray\[([a-z,]+)\]", file.read_text() if file.is_file() else ""):
            assert set(names.split(",")) <= extras


def test_every_file_is_listed() -> None:
    listed = set(re.findall(r"\]\(([^).][^)]*)\)", (CONFIGS / "README.md").read_text()))
    files = {str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*") if file.is_file()} - {"README.md"}
    assert files == listed
