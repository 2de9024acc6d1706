"""The wheel, installed where no checkout is: with each of its extras, in an environment that has nothing else.

What an extra asks for is linked from here, which takes seconds; ``make wheel-test`` installs it, as people do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.bare import Bare

ROOT = Path(__file__).parents[1]
PACKAGES = ("actors", "observer", "plugin")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]


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
        "import swanlab_ray.observer as o, swanlab_ray.observer.agent.process as agent\n"
        "observer = o.connect(mode='disabled'); observer.log({'x': 1}); observer.finish()\n"
        "print(agent.__file__, o.connect, flush=True)\n"
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
    assert f" {VERSION} (journal's protocol " in done.stdout


USES = {
    "": """
        from swanlab_ray.observer import connect
        observer = connect(project="p", mode="offline", log_dir="swanlog", run_id="bare", dashboard=False)
        for step in range(3):
            observer.log({"loss": 1.0 / (step + 1)}, step)
        assert observer.finish()
    """,
    "dashboard": """
        import swanboard
        from ray.dashboard.head import DashboardHead
    """,
    "gpu": """
        import pynvml
    """,
    "train": """
        import ray.train
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    """,
    "transformers": """
        import torch
        from accelerate import Accelerator
        from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        from swanlab_ray.observer import ObserverCallback, ObserverTracker
        sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        model = LlamaForCausalLM(LlamaConfig(**sizes))
        rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 4
        arguments = TrainingArguments("output", max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[ObserverCallback(mode="disabled")])
        trainer.train()
        accelerator = Accelerator(cpu=True, log_with=ObserverTracker(mode="disabled"))
        accelerator.init_trackers("p")
        accelerator.log({"loss": 1.0}, step=1)
        accelerator.end_training()
    """,
    "trl": """
        from trl import DPOTrainer, GRPOTrainer
        from swanlab_ray.observer import completions
        from swanlab_ray.observer.trainers.algorithms import detect
        assert detect(GRPOTrainer.__new__(GRPOTrainer)) == "grpo"
    """,
}
"""What is done with each extra; the empty one is the wheel alone."""
INSTALLED = os.environ.get("TESTS_WHEEL") == "installed"


@pytest.fixture
def bare(wheel: Path, tmp_path: Path) -> Bare:
    return Bare(tmp_path / "environment", wheel)


@pytest.mark.parametrize("extra", USES)
def test_each_extra_asks_for_all_that_it_is_used_with(extra: str, bare: Bare, tmp_path: Path) -> None:
    (bare.install if INSTALLED else bare.link)(extra)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    used = bare.run("python", "-c", textwrap.dedent(USES[extra]), cwd=elsewhere)
    assert used.returncode == 0, used.stderr[-3000:]
    assert f" {VERSION} (journal's protocol " in bare.run("swanlab-ray", "--version", cwd=elsewhere).stdout
    where = bare.run("python", "-c", "import swanlab_ray.observer as o; print(o.__file__)", cwd=elsewhere)
    assert where.stdout.startswith(str(tmp_path)), where
    if not extra:
        shown = bare.run("swanlab-ray", "show", "bare", cwd=elsewhere)
        assert "success" in shown.stdout, shown
        refused = bare.run("swanlab-ray", "demo", "--ranks", "2", cwd=elsewhere)
        assert refused.returncode == 1
        assert "The demo needs torch, which is missing" in refused.stderr


def test_the_demo_s_extra_asks_for_what_two_others_do(bare: Bare) -> None:
    assert bare.needed("demo") == bare.needed("dashboard") | bare.needed("transformers")


@pytest.mark.skipif(not INSTALLED, reason="`make wheel-test` installs it")
def test_the_demo_runs_where_only_it_is_installed(bare: Bare, tmp_path: Path) -> None:
    bare.install("demo")
    done = bare.run("swanlab-ray", "demo", "--ranks", "2", "--steps", "10", cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_every_extra_is_used() -> None:
    assert {*USES, "demo", "test"} == {"", *PROJECT["optional-dependencies"]}
