"""The Axolotl plugin in the real Axolotl, which is beside what is installed: `make test` runs this with it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import SecretStr

if find_spec("axolotl") is None:
    pytest.skip("Axolotl is not installed: `make test` runs these tests with it", allow_module_level=True)

from swanlab_ray.actors.history import find_runs
from swanlab_ray.actors.settings import ObserverSettings, SettingsError
from swanlab_ray.observer import archive, current, notices, transcripts
from swanlab_ray.plugin import SwanLabRayPlugin, driver
from swanlab_ray.plugin.args import KEYS, SwanLabRayArgs, settings_from
from tests import axolotl_files, rlhf
from tests.axolotl_files import BATCH, PLUGIN, STEPS
from tests.conftest import Launch, SharedCluster, wait_until
from tests.incarnations import Cluster, Link, mortal
from tests.lark_bot import SECRET, TOKEN, LarkGroup, texts
from tests.swanlab_cloud import KEY, SwanLabCloud
from tests.swanlab_file import RunFile, only_run

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "cluster_configs" / "axolotl").glob("*.yaml"))
QUIET = {"AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled"}
Run = Callable[..., RunFile]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and data."""
    directory = tmp_path_factory.mktemp("axolotl")
    axolotl_files.make(directory)
    return directory


@pytest.fixture
def axolotl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Axolotl in this process, as if it had just been started in the directory that is returned; writers are in this
    process as well."""
    from axolotl.integrations.base import PluginManager

    mortal(monkeypatch, swanlab=True)
    monkeypatch.setattr("swanlab_ray.observer.session.RayLink", lambda settings, _: Link(Cluster(settings)))
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["axolotl"])
    monkeypatch.setattr(PluginManager, "_instance", None)
    monkeypatch.setattr(PluginManager, "_cfg", None)
    monkeypatch.setattr(notices.logger, "propagate", True)
    monkeypatch.chdir(tmp_path)
    streams = sys.stdout, sys.stderr
    yield tmp_path
    sys.stdout, sys.stderr = streams  # Axolotl copies what is printed to a file
    observer = current()
    if observer is not None:
        observer.finish("aborted", "the test left it open", timeout=20)


@pytest.fixture
def train(axolotl: Path, files: Path) -> Run:
    """``axolotl train``: the run it leaves behind."""

    def run(algorithm: str, options: dict[str, str] | None = None, **keys: Any) -> RunFile:
        from axolotl.cli.train import do_cli

        do_cli(config=axolotl_files.config(files, axolotl, algorithm, **keys), **options or {})
        assert current() is None  # closed when the training was over
        return only_run(axolotl / "swanlog")

    return run


def load(path: str, **options: str) -> Any:
    """What Axolotl makes of a YAML."""
    from axolotl.cli.config import load_cfg

    return load_cfg(path, **options)


def rows_in(log_dir: Path) -> list[dict[str, Any]]:
    (run,) = find_runs([log_dir])
    return list(transcripts.completions(run))


# What is logged.


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "kto", "orpo", "grpo"])
def test_a_training(train: Run, axolotl: Path, algorithm: str) -> None:
    """Metrics, configuration, spans and rows of completions in one run that ended well."""
    run = train(algorithm)
    assert run.state == "finished"
    for name in ("loss", "learning_rate", "grad_norm", "epoch", "global_step"):
        assert {*range(1, STEPS + 1)} <= run.scalars[f"train/{name}"].keys()
    phases = {"data", "forward", "backward", "optimizer"} if algorithm == "sft" else {"data", "optimizer"}
    assert phases <= {name.removeprefix("profiling/") for name in run.scalars}
    config = run.config
    assert config["axolotl"]["base_model"].endswith("/model")
    assert config["axolotl"]["micro_batch_size"] == BATCH
    assert yaml.safe_load(config["axolotl_yaml"])["swanlab_project"] == "axolotl"
    assert config["model"]["class"] == "LlamaForCausalLM"
    assert config["model"]["parameters"] == rlhf.model().num_parameters()
    assert config["training"]["learning_rate"] == config["optimizer"]["learning_rate"] == 1e-3
    assert config["parallelism"]["world_size"] == 1
    assert config["datasets"]["train"] >= 16
    assert config["max_steps"] == STEPS
    rows = rows_in(axolotl / "swanlog")
    assert len(rows) == (0 if algorithm == "sft" else STEPS * BATCH)
    assert {row["algorithm"] for row in rows} <= {algorithm}
    assert len(run.table("rlhf_completions")) == len(rows)
    for row in rows:
        assert "What is" in row["prompt"]
        assert {"dpo": "chosen", "orpo": "log_odds_ratio", "kto": "reward", "grpo": "advantage"}[algorithm] in row


def test_a_trainer_of_one_s_own_is_profiled(train: Run) -> None:
    run = train("sft", trainer_cls="tests.axolotl_trainers.ProfiledTrainer")
    assert set(run.scalars["profiling/Time taken: ProfiledTrainer.training_step"]) == {*range(1, STEPS + 1)}


def test_a_crash_in_the_middle(train: Run, axolotl: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"):
        train("sft", trainer_cls="tests.axolotl_trainers.CrashingTrainer")
    observer = current()
    assert observer is not None
    state, error = observer.result  # what the end of the process reports
    assert (state, (error or "").splitlines()[0]) == ("crashed", "RuntimeError: boom")
    assert observer.finish("crashed", error)
    run = only_run(axolotl / "swanlog")
    assert run.state == "crashed"
    assert set(run.scalars["train/loss"]) == {1, 2}


def test_preprocessing_opens_no_run(axolotl: Path, files: Path) -> None:
    from axolotl.cli.preprocess import do_cli

    do_cli(config=axolotl_files.config(files, axolotl, "sft"))
    assert (axolotl / "prepared").is_dir()
    assert not (axolotl / "swanlog").exists()
    assert current() is None


def test_an_evaluation_is_a_run_with_its_metrics(axolotl: Path, files: Path) -> None:
    from axolotl.cli.evaluate import do_cli

    do_cli(config=axolotl_files.config(files, axolotl, "sft", val_set_size=0.2))
    observer = current()
    assert observer is not None
    assert observer.finish()
    run = only_run(axolotl / "swanlog")
    assert "eval/loss" in run.scalars
    assert run.state == "finished"


# What is configured.


def test_every_key_has_a_type_a_description_and_its_setting() -> None:
    """The fifteen of Axolotl's own integration, and those of the observer."""
    properties = SwanLabRayArgs.model_json_schema()["properties"]
    assert properties.keys() == KEYS.keys() | {driver.KEY}
    assert sum(key == "use_swanlab" or key.startswith("swanlab_") for key in KEYS) == 15
    assert sorted(KEYS.values()) == sorted(ObserverSettings.model_fields)
    assert all(known["description"] and "anyOf" in known for known in properties.values())
    assert "Default: 100." in properties["swanlab_completion_log_interval"]["description"]


def test_keys_become_settings(tmp_path: Path) -> None:
    settings = settings_from(
        {
            "swanlab_project": "p",
            "swanlab_experiment_name": "e",
            "swanlab_description": "d",
            "swanlab_mode": "local",
            "swanlab_workspace": "w",
            "swanlab_api_key": SecretStr("k"),
            "swanlab_web_host": "https://w",
            "swanlab_api_host": "https://a",
            "swanlab_log_model": True,
            "swanlab_lark_webhook_url": SecretStr("https://open.feishu.cn/open-apis/bot/v2/hook/x"),
            "swanlab_lark_secret": SecretStr("s"),
            "swanlab_log_completions": False,
            "swanlab_completion_log_interval": 7,
            "swanlab_completion_max_buffer": 8,
            "observer_log_dir": str(tmp_path),
            "observer_alerts": ["loss < 1.0"],
            "observer_rank_series": "all",
            "micro_batch_size": 4,
        }
    )
    assert settings.use_swanlab  # by its project
    assert (settings.project, settings.experiment_name, settings.description) == ("p", "e", "d")
    assert (settings.mode, settings.workspace, settings.web_host) == ("local", "w", "https://w")
    assert (settings.log_completions, settings.completion_log_interval, settings.completion_max_buffer) == (False, 7, 8)
    assert (settings.log_dir, settings.alerts, settings.rank_series) == (tmp_path, ("loss < 1.0",), 1 << 31)
    assert settings.lark_secret is not None
    assert settings.lark_secret.get_secret_value() == "s"


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"use_swanlab": True}, "SwanLab enabled but 'swanlab_project' is not set"),
        ({}, "SwanLab enabled but 'swanlab_project' is not set: add 'swanlab_project: my-project'"),
        ({"swanlab_project": ""}, "swanlab_project cannot be an empty string."),
        (
            {"swanlab_mode": "invalid-mode"},
            "Invalid swanlab_mode: 'invalid-mode'. Valid options: cloud, local, offline, disabled",
        ),
        ({"swanlab_projct": "q"}, "Unknown key 'swanlab_projct': did you mean 'swanlab_project'?"),
        ({"observer_logdir": "q"}, "Unknown key 'observer_logdir': did you mean 'observer_log_dir'?"),
        ({"swanlab_completion_log_interval": "often"}, "Invalid swanlab_completion_log_interval 'often'"),
        ({"swanlab_completion_max_buffer": 0}, "Invalid swanlab_completion_max_buffer 0"),
        ({"swanlab_project": 17}, "Invalid swanlab_project"),
        ({"swanlab_lark_webhook_url": "https://example.com/s3cret"}, "Invalid swanlab_lark_webhook_url"),
        ({"swanlab_lark_secret": 1234567}, "Invalid swanlab_lark_secret"),
        ({"observer_alerts": ["loss <"]}, "Invalid observer_alerts: 'loss <' is no rule"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_sentence(
    axolotl: Path, files: Path, keys: dict[str, Any], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    project = None if not keys or "use_swanlab" in keys else "p"
    path = axolotl_files.config(files, axolotl, "sft", **{"swanlab_project": project} | keys)
    with pytest.raises(SettingsError, match=re.escape(sentence)) as raised:
        load(path)
    assert "\n" not in str(raised.value)
    everything = str(raised.value) + "".join(capfd.readouterr())
    assert "s3cret" not in everything
    assert "1234567" not in everything
    assert not (axolotl / "swanlog").exists()


def test_the_schema_refuses_the_same() -> None:
    with pytest.raises(ValueError, match="'swanlab_project' is not set"):
        SwanLabRayArgs.model_validate({"use_swanlab": True})
    with pytest.raises(ValueError, match="Invalid swanlab_mode: 'clod'"):
        SwanLabRayArgs.model_validate({"swanlab_project": "p", "swanlab_mode": "clod"})
    kept = SwanLabRayArgs.model_validate({"swanlab_project": "p"}).model_dump(exclude_none=True)
    assert kept == {"swanlab_project": "p"}  # what the YAML does not say, the environment may


def test_an_explicit_false_and_disabled_do_nothing(train: Run, axolotl: Path, files: Path) -> None:
    from axolotl.cli.train import do_cli

    cases: list[dict[str, Any]] = [{"use_swanlab": False}, {"swanlab_mode": "disabled"}]
    for number, keys in enumerate(cases):
        directory = axolotl / str(number)
        directory.mkdir()
        do_cli(config=axolotl_files.config(files, directory, "sft", max_steps=1, **keys))
        assert current() is None
    assert not (axolotl / "swanlog").exists()


def test_the_command_line_wins(train: Run) -> None:
    run = train("sft", {"swanlab_experiment_name": "other", "max_steps": "2"})
    assert set(run.scalars["train/loss"]) == {1, 2}
    assert run.config["axolotl"]["swanlab_experiment_name"] == "other"
    assert "swanlab_experiment_name" not in yaml.safe_load(run.config["axolotl_yaml"])


def test_the_environment_is_read(axolotl: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWANLAB_PROJ_NAME", "from-env")
    plugin = SwanLabRayPlugin()
    plugin.register({"plugins": [PLUGIN], "swanlab_mode": "offline"})
    assert plugin._settings is not None
    assert (plugin._settings.project, plugin._settings.mode) == ("from-env", "offline")


def test_beside_axolotl_s_own_integration_it_refuses(axolotl: Path) -> None:
    plugins = [PLUGIN, "axolotl.integrations.swanlab.SwanLabPlugin"]
    with pytest.raises(SettingsError, match=r"Two plugins for SwanLab: remove axolotl.integrations.swanlab"):
        SwanLabRayPlugin().register({"plugins": plugins, "swanlab_project": "p"})


def test_a_configuration_without_the_plugin_is_left_alone(axolotl: Path) -> None:
    """Axolotl registers every plugin it has ever loaded."""
    plugin = SwanLabRayPlugin()
    plugin.register({"plugins": ["another.Plugin"], "swanlab_mode": "nonsense"})
    assert plugin.add_callbacks_pre_trainer({}, None) == []


def test_what_is_missing_is_said(axolotl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swanlab_ray.plugin.hooks.find_spec", lambda name: None if name == "swanlab" else True)
    with pytest.raises(SettingsError, match="swanlab is not installed: pip install swanlab"):
        SwanLabRayPlugin().register({"plugins": [PLUGIN], "swanlab_project": "p", "swanlab_mode": "offline"})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, None),
        ({"use_wandb": True}, "Multiple logging tools enabled: SwanLab, WandB. Expected overhead: ~3.0% per training"),
        ({"wandb_project": "w"}, "Multiple logging tools enabled: SwanLab, WandB."),
        ({"use_trackio": True}, "Multiple logging tools enabled: SwanLab, Trackio."),
        ({"use_tensorboard": True}, "Multiple logging tools enabled: SwanLab, TensorBoard."),
        ({"use_otel_metrics": True}, "Multiple logging tools enabled: SwanLab, OpenTelemetry."),
        ({"use_comet": True, "use_mlflow": True}, "3 logging tools enabled simultaneously! SwanLab, MLflow, Comet. "
         "Expected overhead: ~4.5% per training step. STRONGLY RECOMMEND: Disable all but ONE logging tool."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_several_loggers(
    axolotl: Path, keys: dict[str, Any], said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    SwanLabRayPlugin().register({"plugins": [PLUGIN], "swanlab_project": "p", "swanlab_mode": "offline"} | keys)
    printed = capsys.readouterr().err
    assert said in printed if said else "logging tools" not in printed


def test_the_cloud_without_a_key(
    axolotl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(axolotl))
    SwanLabRayPlugin().register({"plugins": [PLUGIN], "swanlab_project": "p"})
    printed = capsys.readouterr().err
    assert "SwanLab cloud mode enabled but no API key found." in printed
    for solution in ("export SWANLAB_API_KEY=", "swanlab_api_key: ", "swanlab login", "swanlab_mode: local"):
        assert solution in printed
    SwanLabRayPlugin().register({"plugins": [PLUGIN], "swanlab_project": "p", "swanlab_api_key": "k3y"})
    assert "no API key found" not in capsys.readouterr().err


def test_a_worker_gets_what_the_driver_knew(axolotl: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the driver's environment, its paths and its YAML, on a machine that has none of them."""
    path = axolotl_files.config(files, axolotl, "sft", use_ray=True, comet_api_key="c0met-key")
    monkeypatch.setenv("SWANLAB_API_KEY", "k3y-of-the-env")
    cfg = load(path)
    assert "k3y-of-the-env" not in repr(cfg)
    monkeypatch.delenv("SWANLAB_API_KEY")
    monkeypatch.chdir("/")
    Path(path).unlink()
    worker = SwanLabRayPlugin()
    worker.register(json.loads(json.dumps(cfg.to_dict(), default=str)) | {driver.KEY: cfg[driver.KEY]})
    assert worker._settings is not None
    assert worker._settings.api_key is not None
    assert worker._settings.api_key.get_secret_value() == "k3y-of-the-env"
    assert worker._settings.log_dir == axolotl / "swanlog"
    assert "tests.axolotl_cpu.CpuPlugin" in worker._yaml
    assert "c0met-key" not in worker._yaml


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(axolotl: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the schema that Axolotl makes of its own keys and those of the plugins."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    monkeypatch.setenv("SWANLAB_API_KEY", "k")
    written = yaml.safe_load(path.read_text())
    cfg = DictDefault(written)
    prepare_plugins(cfg)
    checked = validate_config(
        cfg, {"bf16": True, "n_gpu": 1, "compute_capability": "sm_90"}, {"torch_version": "2.13.0"}
    )
    for key, value in written.items():
        if key.startswith(("swanlab_", "observer_")):
            kept = checked[key]
            assert (kept.get_secret_value() if isinstance(kept, SecretStr) else kept) == value


# Several ranks, in processes of their own.

TRAIN = """
if __name__ == "__main__":
    from axolotl.cli.train import do_cli
    do_cli(config={!r})
"""


def test_two_ranks_under_torchrun(launch: Launch, files: Path, tmp_path: Path, in_cluster: SharedCluster) -> None:
    """One run, one start and one end in the group, rows of both ranks."""
    path = axolotl_files.config(files, tmp_path, "dpo")
    with LarkGroup() as group:
        done = launch(TRAIN.format(path), ranks=2, **QUIET | group.environment()).wait()
        assert done.code == 0, done.output
        wait_until(lambda: len(group.cards) >= 2)
    assert group.titles() == ["Training started", "Training complete"]
    assert done.output.count("Distributed training detected (world_size=2)") == 1
    assert done.output.count("SwanLab initialized for project: axolotl") == 1
    assert done.output.count("SwanLab RLHF completion logging enabled for AxolotlDPOTrainer (type: dpo)") == 1
    check_two_ranks(only_run(tmp_path / "swanlog"), tmp_path / "swanlog")


def check_two_ranks(run: RunFile, log_dir: Path) -> None:
    assert run.state == "finished"
    assert set(run.scalars["ranks/loss/mean"]) == {*range(1, STEPS + 1)}
    rows = rows_in(log_dir)
    expected = [(step, rank) for step in range(1, STEPS + 1) for rank in range(2) for _ in range(BATCH)]
    assert [(row["step"], row["rank"]) for row in rows] == expected
    assert {"data", "backward", "optimizer"} <= {
        name.removeprefix("ranks/profiling/").split("/")[0] for name in run.scalars
    }


def test_two_workers_of_ray_train_and_no_secret_anywhere(
    launch: Launch, files: Path, tmp_path: Path, in_cluster: SharedCluster
) -> None:
    """Into the cloud, with all secrets in the driver's YAML or environment."""
    with SwanLabCloud() as cloud, LarkGroup() as group:
        path = axolotl_files.config(
            files, tmp_path, "dpo",
            use_ray=True, ray_num_workers=2, ray_run_name="test", resources_per_worker={"CPU": 1},
            swanlab_mode="cloud", swanlab_api_key=KEY, swanlab_api_host=cloud.url, swanlab_web_host=cloud.url,
            swanlab_lark_webhook_url=group.url, comet_api_key="c0met-key", observer_log_dir="relative",
        )  # fmt: skip
        done = launch(TRAIN.format(path), ranks=0, **QUIET | {"SWANLAB_MODE": "", "SWANLAB_LARK_SECRET": SECRET}).wait()
        assert done.code == 0, done.output
        wait_until(lambda: len(group.cards) >= 2)
        experiment = cloud.only()
    assert group.titles() == ["Training started", "Training complete"]
    assert "axolotl" in texts(group.cards[0])
    assert experiment.state == "FINISHED"
    assert set(experiment.points["train/loss"]) == {*range(1, STEPS + 1)}
    assert "rlhf_completions" in experiment.media
    printed = "".join(file.read_text() for file in (in_cluster.session_dir / "logs").glob("worker-*"))
    assert "SwanLab RLHF completion logging enabled for AxolotlDPOTrainer (type: dpo)" in printed
    (run,) = archive.load(tmp_path / "relative")
    assert run.state == "success"
    rows = rows_in(tmp_path / "relative")
    assert {(row["step"], row["rank"]) for row in rows} == {
        (step, rank) for step in range(1, STEPS + 1) for rank in (0, 1)
    }
    Path(path).unlink()
    searched = 0
    for directory in (tmp_path, in_cluster.session_dir / "logs"):
        for file in directory.rglob("*"):
            if file.is_file():
                searched += 1
                content = file.read_bytes()
                for secret in (KEY, SECRET, TOKEN, "c0met-key"):
                    assert secret.encode() not in content, f"{secret} in {file}"
    assert searched > 20
    assert not any(secret in str(content) for content in cloud.files.values() for secret in (KEY, SECRET, TOKEN))
