"""The pipelines as steps of Kubeflow Pipelines 2: what `kedro kubeflow` writes.

A step is a container that runs one of Kedro's pipelines. All mount one volume as the project's data folder, where each
finds the tables of those before it, its own checkpoint after a kill, and the lock that lets one at a time write.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htr_pipeline.core.config import UserError
from htr_pipeline.io.atomic import replacing
from htr_pipeline.io.tracking import JOINT_RUN, without_passwords

PROJECT = "/htr"  # in the image, as the Dockerfile has it
_NAME = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?"  # of Kubernetes' objects, RFC 1123
_RUN_ID = "metadata.labels['pipeline/runid']"  # of the pod; Kubeflow's own placeholder is not filled in everywhere
_IMAGE = r"[A-Za-z0-9][-A-Za-z0-9_.:/@]*"
_HERE = r"(?i)://(localhost|127\.|0\.0\.0\.0|\[::1?\])"
_TRAINING = ("training", "retraining")
_SET = ("MLFLOW_TRACKING_URI", JOINT_RUN)


@dataclass(frozen=True)
class Steps:
    """What the containers are.

    Attributes:
        image: with the project in /htr and `kedro` in its path.
        tracking_uri: address of the MLflow server.
        claim: PersistentVolumeClaim of the volume that is mounted as /htr/data.
        secrets: keys of Kubernetes secrets as (secret, key); each becomes the environment variable of the key's name.
        cpus: request of each step, as Kubernetes writes it.
        memory: request and limit of each step, likewise.
        gpus: for the steps that train.
        retries: of a step whose process fails or is killed; training goes on from its checkpoint.
    """

    image: str
    tracking_uri: str
    claim: str = "htr-data"
    secrets: Sequence[tuple[str, str]] = ()
    cpus: str | None = None
    memory: str | None = None
    gpus: int = 0
    retries: int = 2

    def __post_init__(self) -> None:
        if not re.fullmatch(_IMAGE, self.image):
            raise UserError(f"--image {self.image}: expected the name of an image, such as REGISTRY/htr_pipeline:1.")
        if not re.match("https?://", self.tracking_uri, re.IGNORECASE):
            raise UserError(
                f"MLflow at {without_passwords(self.tracking_uri)}: containers need a server, since a file in one is "
                "gone with it. Give its address, such as http://mlflow.mlflow:5000, by --tracking-uri, "
                "MLFLOW_TRACKING_URI or conf/local/mlflow.yml."
            )
        if without_passwords(self.tracking_uri) != self.tracking_uri:
            raise UserError(
                "MLflow's address holds a password, which everyone who sees the pipeline could read. Put it into a "
                "Kubernetes secret with the keys MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and name these "
                "by --secret NAME:KEY."
            )
        if not re.fullmatch(r"\w+://[!-~]+", self.tracking_uri) or re.search(_HERE, self.tracking_uri):
            raise UserError(
                f"MLflow at {self.tracking_uri}: expected an address that a container on the cluster can reach, such "
                "as http://mlflow.mlflow:5000; localhost would be the container itself."
            )
        if not re.fullmatch(_NAME, self.claim):
            raise UserError(f"--claim {self.claim}: expected the name of a PersistentVolumeClaim, such as htr-data.")
        for secret, key in self.secrets:
            if not re.fullmatch(_NAME, secret) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
                raise UserError(
                    f"--secret {f'{secret}:{key}'.rstrip(':')}: expected the name of a secret and that of a key which "
                    "can be an environment variable, such as mlflow:MLFLOW_TRACKING_PASSWORD."
                )
            if key in _SET or [each for _, each in self.secrets].count(key) > 1:
                raise UserError(f"--secret {secret}:{key}: {key} would be set twice.")
        if self.cpus and not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?|[0-9]{1,9}m", self.cpus):
            raise UserError(f"--cpus {self.cpus}: expected a number, such as 4, 0.5 or 500m.")
        if self.memory and not re.fullmatch(r"[0-9]{1,9}[TGM]i?", self.memory):
            raise UserError(f"--memory {self.memory}: expected a whole number with its unit, such as 8Gi or 8000M.")


def run_commands(pipelines: Sequence[str], env: str | None) -> dict[str, list[str]]:
    """A step for each of Kedro's pipelines, given in the order in which data flows."""
    environment = ["--env", env] if env else []
    return {name: ["kedro", "run", "--pipeline", name, *environment] for name in pipelines}


def schedule_commands(env: str | None) -> dict[str, list[str]]:
    """One step, which looks for new lines and retrains where there are any: for recurring runs."""
    return {"retraining": ["kedro", "schedule", *(["--env", env] if env else [])]}


def write_pipeline(output: Path, commands: Mapping[str, Sequence[str]], steps: Steps, params: str = "") -> None:
    """Writes the pipeline as Kubeflow's pages, its client and its command line take it.

    Args:
        output: a YAML file, replaced in one step.
        commands: of the steps, by their names. One step follows the other, since one run at a time may write into a
            data folder.
        steps: what they run in.
        params: as `kedro run --params` takes them, for runs that are started without any.

    Raises:
        UserError: kfp is not installed, or the file is not named .yaml.
    """
    try:
        from kfp import compiler, dsl, kubernetes
    except ImportError as exc:
        raise UserError(
            f"Kubeflow's compiler cannot be loaded ({exc}). Install it: .venv/bin/pip install 'kfp>=2.17' "
            "'kfp-kubernetes>=2.17'"
        ) from exc
    if not params.isprintable():
        raise UserError(f"--params {params!r}: expected printable characters.")
    if output.suffix != ".yaml":
        raise UserError(f"--output {output}: expected a file named .yaml, such as kubeflow.yaml.")

    def container(name: str) -> Any:
        def step(params: str) -> dsl.ContainerSpec:
            return dsl.ContainerSpec(image=steps.image, command=[*commands[name]], args=["--params", params])

        step.__name__ = name
        return dsl.container_component(step)

    def equip(task: Any, trains: bool) -> None:
        task.set_env_variable("MLFLOW_TRACKING_URI", steps.tracking_uri)
        kubernetes.use_field_path_as_env(task, env_name=JOINT_RUN, field_path=_RUN_ID)
        for secret, key in steps.secrets:
            kubernetes.use_secret_as_env(task, secret_name=secret, secret_key_to_env={key: key})
        kubernetes.mount_pvc(task, pvc_name=steps.claim, mount_path=f"{PROJECT}/data")
        task.set_caching_options(False)  # Kubeflow knows nothing of what lies on the volume
        if steps.retries:
            task.set_retry(steps.retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
        if steps.cpus:
            task.set_cpu_request(steps.cpus)
        if steps.memory:
            task.set_memory_request(steps.memory).set_memory_limit(steps.memory)
        if steps.gpus and trains:
            task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(steps.gpus)

    def pipeline(params: str = params) -> None:
        before = None
        for name in commands:
            task = container(name)(params=params)
            equip(task, trains=name in _TRAINING)
            if before:
                task.after(before)
            before = task

    description = "Handwritten text recognition: from lines with transcriptions to a registered recogniser."
    compiled = dsl.pipeline(pipeline, name="htr-pipeline", description=description)
    with replacing(output) as partial:
        compiler.Compiler().compile(compiled, str(partial))
