"""What the files for Ray's cluster launcher, for submitted jobs and for Axolotl may say, besides what Ray refuses."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema  # type: ignore[import-untyped]
from pydantic import AfterValidator, IPvAnyAddress, StringConstraints, TypeAdapter

from swanlab_ray.actors.settings import ObserverSettings
from tests import cluster_shell
from tests.cluster_manifests import RAY, SETTINGS, Count, Name, Some, Strict, Text

WHEEL = re.compile(r'pip install "\$\(ls (\S+)/swanlab_ray-\*\.whl\)\[[a-z,]+\]"')


def command(text: str) -> str:
    """A command on a node: shellcheck takes it, and so does ``ray`` what it is told."""
    problems = list(cluster_shell.shellcheck(text, "--shell=bash"))
    if problems:
        raise ValueError("; ".join(problems))
    if text.startswith("ray "):
        cluster_shell.ray(shlex.split(text.replace("$RAY_HEAD_IP", "192.0.2.1"))[1:])
    elif not WHEEL.fullmatch(text):
        raise ValueError(f"{text} is not ours")
    return text


Command = Annotated[str, AfterValidator(command)]
Address = Annotated[str, AfterValidator(lambda text: str(TypeAdapter(IPvAnyAddress).validate_python(text)))]


class Auth(Strict):
    ssh_user: Name


class Launcher(Strict):
    cluster_name: Name
    auth: Auth
    file_mounts: dict[Text, Literal["dist"]]
    setup_commands: list[Command]

    def problems(self) -> Iterator[str]:
        """What its parts do not agree on."""
        for found in map(WHEEL.fullmatch, self.setup_commands):
            if found is None or found[1] not in self.file_mounts:
                yield f"{self.setup_commands} installs what is not copied"


class OnPremise(Launcher):
    class _Provider(Strict):
        type: Literal["local"]
        head_ip: Address
        worker_ips: list[Address]

    provider: _Provider
    head_start_ray_commands: list[Command]
    worker_start_ray_commands: list[Command]


class Aws(Launcher):
    class _Provider(Strict):
        type: Literal["aws"]
        region: Annotated[str, StringConstraints(pattern=r"^[a-z]{2}(-[a-z]+)+-\d$")]

    class _Docker(Strict):
        image: str
        container_name: Name

    class _NodeType(Strict):
        class _Instance(Strict):
            class _Device(Strict):
                class _Disk(Strict):
                    VolumeSize: Some
                    VolumeType: Literal["gp3"]

                DeviceName: Literal["/dev/sda1"]
                Ebs: _Disk

            InstanceType: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]+\.[a-z0-9-]+$")]
            BlockDeviceMappings: list[_Device]

        resources: dict[Literal["CPU", "GPU"], Count]
        min_workers: Count = 0
        max_workers: Some = 1
        node_config: _Instance

    max_workers: Some
    idle_timeout_minutes: Some
    provider: _Provider
    docker: _Docker
    available_node_types: dict[Name, _NodeType]
    head_node_type: Name

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not self.docker.image.startswith(f"rayproject/ray:{RAY}-"):
            yield f"{self.docker.image} has another Ray than constraints.txt"


def launcher(written: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a file for ``ray up``: by Ray's own schema as it is written, by Ray with its defaults,
    and by what is used of it."""
    import ray.autoscaler
    from ray.autoscaler._private import util

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(written, schema)
    util.validate_config(util.prepare_config(written))
    models: dict[str, type[Launcher]] = {"local": OnPremise, "aws": Aws}
    yield from models[written["provider"]["type"]].model_validate(written).problems()


class RuntimeEnvironment(Strict):
    """Of ``ray job submit``."""

    env_vars: dict[Literal["OBSERVER_LOG_DIR"], Annotated[str, StringConstraints(pattern="^/")]]
    excludes: list[Annotated[str, StringConstraints(pattern=r"^/[\w.]+/$")]]


def runtime_environment(written: dict[str, Any]) -> None:
    """Raises what Ray or :class:`RuntimeEnvironment` refuses."""
    from ray.runtime_env import RuntimeEnv

    RuntimeEnv(**written)
    assert RuntimeEnvironment.model_validate(written).env_vars.keys() <= SETTINGS


class Axolotl(Strict):
    """The keys of Axolotl's own that are used, and the observer's."""

    class _Dataset(Strict):
        path: Text
        type: Text

    plugins: list[
        Literal["swanlab_ray.plugin.SwanLabRayPlugin", "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]
    ]
    base_model: Text
    model_type: Text | None = None
    rl: Literal["dpo"] | None = None
    datasets: list[_Dataset]
    sequence_len: Some
    micro_batch_size: Some
    gradient_accumulation_steps: Some
    num_epochs: Some
    learning_rate: Annotated[str, AfterValidator(lambda text: str(float(text)))]  # YAML takes 2e-5 for text
    optimizer: Literal["adamw_torch_fused"]
    bf16: Literal["auto"]
    output_dir: Text
    use_ray: bool = False
    ray_num_workers: Some | None = None
    ray_run_name: Name | None = None

    use_swanlab: bool | None = None
    swanlab_project: Text
    swanlab_experiment_name: Text | None = None
    swanlab_description: Text | None = None
    swanlab_mode: Literal["cloud", "local", "offline"]
    swanlab_workspace: Text | None = None
    swanlab_web_host: Text | None = None
    swanlab_api_host: Text | None = None
    swanlab_lark_webhook_url: Text | None = None
    swanlab_lark_secret: Text | None = None
    swanlab_log_completions: bool | None = None
    swanlab_completion_log_interval: int | None = None
    swanlab_completion_max_buffer: int | None = None
    observer_alerts: list[str] | None = None
    observer_log_dir: Text | None = None
    observer_rank_series: int | None = None
    observer_hang_timeout: int | None = None


def axolotl(written: dict[str, Any]) -> None:
    """Raises what :class:`Axolotl` or the observer's settings refuse; tests/test_plugin.py asks Axolotl itself."""
    read = Axolotl.model_validate(written)
    ours = {
        key: value for key, value in read.model_dump(exclude_none=True).items() if "swanlab" in key or "observer" in key
    }
    ObserverSettings(**{re.sub("^(swanlab|observer)_", "", key): value for key, value in ours.items()})
