"""What the YAML files to copy may say: exactly the fields that they use, each of its type, anything else refused.

No package registry has the definitions of KubeRay and of Kubeflow's training operator, so their objects are described
here as far as they are used. Two others check pods as well: Kubernetes' schema, and the models that Kubeflow ships with
those of its trainer.
"""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import kubernetes_validate
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from swanlab_ray.actors.settings import ObserverSettings
from swanlab_ray.actors.wire.secret_shapes import Sensitivity, sensitivity
from tests import cluster_shell

ROOT = Path(__file__).parents[1]
IMAGE = "registry.example.com/train:1"
"""What docker/Dockerfile is built as."""
IN_THE_IMAGE = {"/home/ray": "docs/examples", "/etc/axolotl": "cluster_configs/axolotl"}
"""Where files of the checkout lie there, or are mounted."""
KUBERNETES = "1.30"
RAY = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]  # type: ignore[index]
SETTINGS = {
    str(alias)
    for field in ObserverSettings.model_fields.values()
    for alias in getattr(field.validation_alias, "choices", ())
} | {"OBSERVER_PORTS"}
"""The variables of the environment that the observer reads."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")]
Count = Annotated[int, Field(ge=0)]
Some = Annotated[int, Field(ge=1)]
Text = Annotated[str, StringConstraints(min_length=1)]
Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(m|[kMGTP]|[KMGTP]i)?$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Name


def program(command: str) -> str:
    """A command that the image of docker/Dockerfile can run.

    Raises:
        ValueError: it has no such program, or that refuses it.
    """
    name, *arguments = shlex.split(command)
    if name not in ("python", "torchrun", "axolotl"):
        raise ValueError(f"the image has no {name}")
    cluster_shell.check(cluster_shell.Call(name, "", tuple(arguments)))
    script = Path(next(argument for argument in arguments if argument.endswith((".py", ".yaml"))))
    if not (ROOT / IN_THE_IMAGE[str(script.parent)] / script.name).exists():
        raise ValueError(f"there is no {script}")
    return command


def pod(template: dict[str, Any]) -> dict[str, Any]:
    """A pod's template, by Kubeflow's models, by what a rank needs, and by Kubernetes' schema.

    Raises:
        ValueError: one of them refuses it.
    """
    _check_pod(json.dumps(template))
    return template


@cache
def _check_pod(text: str) -> None:
    from kubeflow_trainer_api.models import IoK8sApiCoreV1PodTemplateSpec

    template = json.loads(text)
    same(IoK8sApiCoreV1PodTemplateSpec, template)
    spec = template["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for container in spec["containers"]:
        if container["image"] != IMAGE:
            raise ValueError(f"image {container['image']}")
        for amounts in container["resources"].values():
            Resources.model_validate(amounts)
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        check_environment(container["env"])
        log_dir = next(variable["value"] for variable in container["env"] if variable["name"] == "OBSERVER_LOG_DIR")
        if "persistentVolumeClaim" not in mounted[str(Path(log_dir).parent)]:
            raise ValueError(f"{log_dir} goes with the pod")
    kubernetes({"apiVersion": "v1", "kind": "Pod", "metadata": {}} | template)


def kubernetes(written: dict[str, Any]) -> None:
    """Its schema, with unknown fields refused."""
    try:
        kubernetes_validate.validate(written, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise ValueError(error.message) from None


class Resources(Strict):
    """What a container asks for."""

    cpu: Quantity | None = None
    memory: Quantity
    gpus: Annotated[str, StringConstraints(pattern=r"^\d+$")] | None = Field(None, alias="nvidia.com/gpu")


def same(model: Any, written: dict[str, Any]) -> None:
    """Nothing is lost in one of Kubeflow's models, which leave out what they do not know."""
    understood = model.from_dict(written).to_dict()
    if understood != written:
        raise ValueError(f"{model.__name__} understands only {understood}")


def check_environment(variables: list[dict[str, Any]]) -> None:
    """Each variable is one that is read; no secret is written down, and each comes from the Secret ``swanlab``."""
    for variable in variables:
        name = variable["name"]
        if name not in SETTINGS:
            raise ValueError(f"nothing reads {name}")
        if "value" not in variable:
            source = variable["valueFrom"]["secretKeyRef"]
            if source["name"] != "swanlab" or source["key"] not in ("api-key", "lark-webhook-url", "lark-secret"):
                raise ValueError(f"there is no secret {source}")
        elif sensitivity(name) != Sensitivity.NONE:
            raise ValueError(f"{name} is a secret")


Pod = Annotated[dict[str, Any], AfterValidator(pod)]
Command = Annotated[str, AfterValidator(program)]


def ray_options(options: dict[str, str]) -> dict[str, str]:
    """Those of ``ray start``."""
    cluster_shell.ray(["start", "--head", *(f"--{name}={value}" for name, value in options.items())])
    return options


RayOptions = Annotated[dict[str, str], AfterValidator(ray_options)]


class HeadGroup(Strict):
    rayStartParams: RayOptions
    template: Pod


class WorkerGroup(Strict):
    groupName: Name
    replicas: Count
    minReplicas: Count
    maxReplicas: Some
    rayStartParams: RayOptions
    template: Pod

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError(f"{self.replicas} replicas are not between the least and the most")
        return self


class Cluster(Strict):
    rayVersion: str
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]

    @model_validator(mode="after")
    def _of_the_image(self) -> Self:
        if self.rayVersion != RAY:
            raise ValueError(f"the image has Ray {RAY}")
        return self


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: Cluster


class Job(Strict):
    entrypoint: Command
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    rayClusterSpec: Cluster


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: Job


def torchrun_pod(template: dict[str, Any]) -> dict[str, Any]:
    """A pod that starts torchrun, in a container that Kubeflow finds by its name."""
    (container,) = pod(template)["spec"]["containers"]
    program(shlex.join(container["command"]))
    return template


class Replicas(Strict):
    replicas: Some
    restartPolicy: Literal["Always", "OnFailure", "Never", "ExitCode"]
    template: Annotated[dict[str, Any], AfterValidator(torchrun_pod)]

    @model_validator(mode="after")
    def _found(self) -> Self:
        if self.template["spec"]["containers"][0]["name"] != "pytorch":
            raise ValueError("the operator looks for a container called pytorch")
        return self


class Roles(Strict):
    Master: Replicas
    Worker: Replicas


class PyTorch(Strict):
    nprocPerNode: Annotated[str, StringConstraints(pattern=r"^(\d+|auto|gpu|cpu)$")]
    pytorchReplicaSpecs: Roles

    @model_validator(mode="after")
    def _one_master(self) -> Self:
        if self.pytorchReplicaSpecs.Master.replicas != 1:
            raise ValueError("there is one master")
        return self


class PyTorchJob(Strict):
    apiVersion: Literal["kubeflow.org/v1"]
    kind: Literal["PyTorchJob"]
    metadata: Metadata
    spec: PyTorch


class RuntimeRef(Strict):
    name: Literal["torch-distributed"]


class Trainer(Strict):
    image: str
    command: list[str]
    numNodes: Some
    numProcPerNode: Some
    resourcesPerNode: dict[str, dict[str, str]]
    env: list[dict[str, Any]]


class Patch(Strict):
    manager: Annotated[str, StringConstraints(pattern=r"^[a-z0-9.-]+/[a-z0-9-]+$")]
    trainingRuntimeSpec: dict[str, Any]


class Train(Strict):
    runtimeRef: RuntimeRef
    trainer: Trainer
    runtimePatches: list[Patch]

    @model_validator(mode="after")
    def _make_a_pod(self) -> Self:
        """The runtime's one container, as the trainer and the patch together describe it."""
        (patch,) = self.runtimePatches
        (job,) = patch.trainingRuntimeSpec["template"]["spec"]["replicatedJobs"]
        spec = job["template"]["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        if (job["name"], container["name"]) != ("node", "node"):
            raise ValueError("the runtime's job and its container are called node")
        described = self.trainer.model_dump(include={"image", "command", "env"})
        whole = container | described | {"resources": self.trainer.resourcesPerNode}
        torchrun_pod({"spec": spec | {"containers": [whole]}})
        return self


class TrainJob(Strict):
    apiVersion: Literal["trainer.kubeflow.org/v1alpha1"]
    kind: Literal["TrainJob"]
    metadata: Metadata
    spec: Train

    @model_validator(mode="before")
    @classmethod
    def _as_kubeflow_has_it(cls, written: dict[str, Any]) -> dict[str, Any]:
        from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

        same(TrainerV1alpha1TrainJob, written)
        return written


class ClaimSpec(Strict):
    class _Resources(Strict):
        class _Requests(Strict):
            storage: Quantity

        requests: _Requests

    accessModes: list[Literal["ReadWriteMany"]]
    resources: _Resources


class Claim(Strict):
    apiVersion: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec

    @model_validator(mode="before")
    @classmethod
    def _as_kubernetes_has_it(cls, written: dict[str, Any]) -> dict[str, Any]:
        kubernetes(written)
        return written


KINDS: dict[str, type[BaseModel]] = {model.__name__: model for model in (RayJob, RayCluster, PyTorchJob, TrainJob)} | {
    "PersistentVolumeClaim": Claim
}
