"""The wheel, installed where no checkout is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("actors", "observer", "plugin")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("README.md", "LICENSE", "pyproject.toml", "py.typed"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(directory), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = directory.glob("swanlab_ray-*.whl")
    return built


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"swanlab_ray"}
    packaged = {name.removeprefix("swanlab_ray/") for name in names if name.endswith(".py")}
    assert packaged == {str(path.relative_to(ROOT)) for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")}
    assert "swanlab_ray/py.typed" in names


def test_it_works_without_a_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    source = (
        "import swanlab_ray.observer as o, swanlab_ray.observer.ray_cluster.keeper as keeper\n"
        "observer = o.connect(mode='disabled'); observer.log({'x': 1}); observer.finish()\n"
        "print(keeper.__file__, o.connect, flush=True)\n"
        "from swanlab_ray.observer.cli import main; main(['--version'])"
    )
    # The venv's own installation is editable: its finder comes after PYTHONPATH.
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f" {version} (journal's protocol " in done.stdout
