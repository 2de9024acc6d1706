"""The files people copy: each is right by all checks that there are for its kind, and they fit together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests import cluster_shell
from tests.cluster_files import CONFIGS, FILES, problems
from tests.cluster_manifests import IMAGE, ROOT, SETTINGS

CLUSTERS = ROOT / "docs" / "clusters.md"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_nothing_is_wrong(path: Path) -> None:
    assert list(problems(path, path.read_text())) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_it_says_how_it_is_used_and_is_short(path: Path) -> None:
    text = path.read_text()
    assert text.removeprefix("#!/usr/bin/env bash\n").startswith("# ")
    assert len(text.splitlines()) <= 60


def test_the_ranks_beside_ray_report_to_it() -> None:
    """And where nothing else is started, to nobody else's."""
    for name, rays in (("torchrun/beside_ray.sh", {"192.0.2.1:6379"}), ("torchrun/two_nodes.sh", {""})):
        path = CONFIGS / name
        for rank in ("0", "1"):
            calls = cluster_shell.calls(path, path.read_text(), *cluster_shell.PROGRAM, NODE_RANK=rank)
            assert {call.ray_address for call in calls if call.program == "torchrun"} == rays


@pytest.mark.parametrize("script", [file for file in FILES if file.suffix == ".sh"], ids=lambda path: path.name)
def test_what_has_to_be_set_is_asked_for(script: Path) -> None:
    for name in re.findall(r"\$\{(\w+):\?", script.read_text()):
        with pytest.raises(ValueError, match=f"{name}: set {name} to "):
            cluster_shell.calls(script, script.read_text(), *cluster_shell.PROGRAM, **{"NODE_RANK": "0", name: ""})


def test_every_file_is_listed() -> None:
    listed = set(re.findall(r"\]\(([^).][^)]*)\)", (CONFIGS / "README.md").read_text()))
    assert {str(file.relative_to(CONFIGS)) for file in FILES} == listed


def test_every_file_is_explained() -> None:
    """Except for Axolotl's, which have a page of their own."""
    explained = set(re.findall(r"\(\.\./cluster_configs/([\w./]+)\)", CLUSTERS.read_text()))
    assert {str(file.relative_to(CONFIGS)) for file in FILES if file.parent.name != "axolotl"} <= explained


BLOCKS = re.findall(r"```bash\n(.*?)```", CLUSTERS.read_text(), re.S)


def test_commands_of_the_page_are_right() -> None:
    """Each by shellcheck, with variables that are read; what is applied, submitted or run is a file that is there."""
    assert len(BLOCKS) >= 10
    folders = {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()}
    for block in BLOCKS:
        assert list(cluster_shell.shellcheck(block, "--shell=bash")) == []
        assert set(re.findall(r"\b(?:OBSERVER|SWANLAB)_[A-Z_]+", block)) <= SETTINGS
        for name in re.findall(r"(?<![\w/.-])((?:\w+/)*[\w-]+\.(?:yaml|sbatch|sh))\b", block):
            if name.split("/")[0] in folders or "/" not in name:
                assert any(str(file).endswith(f"/{name}") for file in FILES), name
        for program, given in re.findall(r"^(?:[A-Z_]+=\S+ )*(torchrun|ray) (.*)", block, re.M):
            cluster_shell.check(cluster_shell.Call(program, "", tuple(given.partition("#")[0].split())))


def test_commands_of_the_page_name_what_the_manifests_do() -> None:
    manifests = {path.stem: path.read_text() for path in FILES if path.parent.name == "kubernetes"}
    names = {stem: yaml.safe_load(text)["metadata"]["name"] for stem, text in manifests.items()}
    text = CLUSTERS.read_text()

    def named(pattern: str) -> set[str]:
        return set(re.findall(pattern, text))

    assert named(r"secret generic (\S+)") == {"swanlab"}
    keys = {key for manifest in manifests.values() for key in re.findall(r"key: ([\w-]+)", manifest)}
    assert named(r"--from-literal=([\w-]+)=") == keys
    assert named(r"persistentvolumeclaim (\S+)") == {names["shared"]}
    assert named(r"rayjob (\w+)") == named(r"job/(\w+)") == {names["rayjob"]}
    assert named(r"service/(\w+)-head-svc") == {names["raycluster"]}
    assert named(r"(\w+)-master-0") == {names["pytorchjob"]}
    assert named(r"jobset-name=(\w+)") == {names["trainjob"]}
    assert named(r"configmap (\w+)") == set(re.findall(r"configMap: \{name: (\w+)", manifests["axolotl_rayjob"]))
    assert named(r"--from-file=(\S+)") == set(re.findall(r"/etc/axolotl/(\S+)", manifests["axolotl_rayjob"]))
    assert named(r"-t (\S+/train:\d)") == {IMAGE}
