"""What `kedro kubeflow` writes, as Kubeflow reads it; tests/test_run.py runs steps of it."""

import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner
from kedro.framework.startup import bootstrap_project
from kfp.cli.recurring_run import recurring_run
from kfp.cli.run import run

from htr_pipeline.cli import cli
from htr_pipeline.core.config import UserError
from htr_pipeline.orchestration.kubeflow import Steps, run_commands, schedule_commands, write_pipeline
from htr_pipeline.pipeline_registry import register_pipelines
from tests.project import ROOT

NAMES = ("data_validation", "feature_extraction", "training", "evaluation", "registration", "reporting")
SERVER = "http://mlflow:5000"


def written(path, commands, steps, params=""):
    write_pipeline(path, commands, steps, params)
    pipeline, platforms = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    return pipeline, platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    steps = Steps(
        "registry/htr:1", SERVER, "lines", secrets=[("mlflow", "MLFLOW_TRACKING_PASSWORD")], cpus="500m", memory="8Gi",
        gpus=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("kubeflow") / "htr.yaml"
    return written(path, run_commands(NAMES, "finetune"), steps, "training.epochs=3,model.size=M")


def executor(pipeline, name):
    return pipeline["deploymentSpec"]["executors"][f"exec-{name.replace('_', '-')}"]["container"]


def test_one_step_follows_the_other_and_none_is_taken_from_a_cache(whole):
    tasks = whole[0]["root"]["dag"]["tasks"]
    names = [name.replace("_", "-") for name in NAMES]
    assert set(tasks) == set(names)
    assert [tasks[name].get("dependentTasks") for name in names] == [None, *([name] for name in names[:-1])]
    assert [tasks[name]["cachingOptions"] for name in names] == [{}] * len(names)
    assert [tasks[name]["retryPolicy"]["maxRetryCount"] for name in names] == [2] * len(names)


def test_steps_are_commands_of_kedro_with_the_settings_of_the_run(whole):
    pipeline = whole[0]
    for name in NAMES:
        container = executor(pipeline, name)
        assert container["image"] == "registry/htr:1"
        assert container["command"] == ["kedro", "run", "--pipeline", name, "--env", "finetune"]
        assert container["args"] == ["--params", "{{$.inputs.parameters['params']}}"]
        assert {"name": "MLFLOW_TRACKING_URI", "value": SERVER} in container["env"]
    given = pipeline["root"]["inputDefinitions"]["parameters"]["params"]
    assert given["defaultValue"] == "training.epochs=3,model.size=M"
    for task in pipeline["root"]["dag"]["tasks"].values():
        assert task["inputs"]["parameters"] == {"params": {"componentInputParameter": "params"}}


def test_all_have_the_volume_the_secret_and_the_id_of_the_run_and_training_alone_the_gpus(whole):
    pipeline, executors = whole
    for name in NAMES:
        on_cluster = executors[f"exec-{name.replace('_', '-')}"]
        (mount,), (secret,), (run_id,) = (on_cluster[key] for key in ("pvcMount", "secretAsEnv", "fieldPathAsEnv"))
        assert (mount["constant"], mount["mountPath"]) == ("lines", "/htr/data")
        assert secret["secretName"] == "mlflow"
        assert secret["keyToEnv"] == [{"envVar": "MLFLOW_TRACKING_PASSWORD", "secretKey": "MLFLOW_TRACKING_PASSWORD"}]
        assert run_id == {"name": "HTR_JOINT_RUN", "fieldPath": "metadata.labels['pipeline/runid']"}
        resources = executor(pipeline, name)["resources"]
        assert resources["resourceCpuRequest"] == "500m"
        assert resources["resourceMemoryRequest"] == resources["resourceMemoryLimit"] == "8Gi"
        assert resources.get("accelerator", {}).get("resourceCount") == ("2" if name == "training" else None)


def test_retraining_is_one_step_without_what_was_not_asked_for(tmp_path):
    pipeline, executors = written(
        tmp_path / "new" / "htr.yaml", schedule_commands("finetune"), Steps("htr", SERVER, gpus=1, retries=0)
    )
    container = executor(pipeline, "retraining")
    assert container["command"] == ["kedro", "schedule", "--env", "finetune"]
    assert container["resources"]["accelerator"]["resourceCount"] == "1"
    assert "secretAsEnv" not in executors["exec-retraining"]
    assert "retryPolicy" not in pipeline["root"]["dag"]["tasks"]["retraining"]
    assert schedule_commands(None) == {"retraining": ["kedro", "schedule"]}
    assert run_commands(["training"], None) == {"training": ["kedro", "run", "--pipeline", "training"]}


def test_the_dockerfile_has_the_project_where_the_steps_look_for_it(whole):
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    (folder,) = (line.split()[1] for line in lines if line.startswith("WORKDIR"))
    assert {mount["mountPath"] for step in whole[1].values() for mount in step["pvcMount"]} == {f"{folder}/data"}


def test_the_steps_are_in_the_order_in_which_data_flows_and_hand_over_files_on_the_volume():
    pipelines = register_pipelines()
    assert [*pipelines] == [*NAMES, "__default__"]
    entries = yaml.safe_load((ROOT / "conf/base/catalog.yml").read_text(encoding="utf-8"))
    made = set()
    for name in NAMES:
        needed = {dataset for dataset in pipelines[name].inputs() if not dataset.startswith("param")}
        assert needed <= made, name
        assert all(entries[dataset]["filepath"].startswith("data/") for dataset in needed)
        made |= pipelines[name].all_outputs()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tracking_uri": "sqlite:////htr/mlflow.db"}, "containers need a server, since a file in one is gone"),
        ({"tracking_uri": "postgresql://me:secret@mlflow/db"}, "MLflow at postgresql://mlflow/db: containers need a"),
        ({"tracking_uri": "http://localhost:5000"}, "MLflow at http://localhost:5000: expected an address that a cont"),
        ({"tracking_uri": "http://my server"}, "MLflow at http://my server: expected an address that a container"),
        ({"image": ""}, "--image : expected the name of an image, such as REGISTRY/htr_pipeline:1"),
        ({"image": "my image"}, "--image my image: expected the name of an image"),
        ({"tracking_uri": "https://me:secret@mlflow"}, "MLflow's address holds a password, which everyone"),
        ({"claim": "My Lines"}, "--claim My Lines: expected the name of a PersistentVolumeClaim, such as htr-data"),
        ({"secrets": [("mlflow", "")]}, "--secret mlflow: expected the name of a secret and that of a key"),
        ({"secrets": [("mlflow", "user-name")]}, "--secret mlflow:user-name: expected"),
        ({"secrets": [("mlflow", "KÄY")]}, "--secret mlflow:KÄY: expected"),
        ({"secrets": [("a", "KEY"), ("b", "KEY")]}, "--secret a:KEY: KEY would be set twice"),
        ({"secrets": [("a", "HTR_JOINT_RUN")]}, "--secret a:HTR_JOINT_RUN: HTR_JOINT_RUN would be set twice"),
        ({"cpus": "four"}, "--cpus four: expected a number, such as 4, 0.5 or 500m"),
        ({"cpus": "٤"}, "--cpus ٤: expected a number"),
        ({"memory": "8 GB"}, "--memory 8 GB: expected a whole number with its unit, such as 8Gi"),
        ({"memory": "1.5Gi"}, "--memory 1.5Gi: expected a whole number with its unit"),
        ({"memory": "8"}, "--memory 8: expected a whole number with its unit"),
    ],
)
def test_what_the_cluster_would_refuse_is_said_now(changed, message):
    with pytest.raises(UserError, match=message) as caught:
        Steps(**{"image": "htr", "tracking_uri": SERVER, **changed})
    assert "me:secret" not in str(caught.value)


def test_another_ending_of_the_file_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(UserError, match=r"--output .*htr\.yml: expected a file named \.yaml"):
        write_pipeline(tmp_path / "htr.yml", schedule_commands(None), Steps("htr", SERVER))
    assert not list(tmp_path.iterdir())


def test_signs_that_break_lines_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--params '\\u2028x=1': expected printable characters"):
        write_pipeline(tmp_path / "htr.yaml", schedule_commands(None), Steps("htr", SERVER), "\u2028x=1")


class Client:
    """Takes the place of kfp's, which asks a cluster; notes what its command line was asked for."""

    def __init__(self):
        self.asked = {}

    def create_experiment(self, name):
        return SimpleNamespace(experiment_id=name)

    def create_recurring_run(self, **asked):
        self.asked = asked

    def run_pipeline(self, **asked):
        self.asked = asked


@pytest.mark.parametrize("retrain", [False, True])
def test_the_command_line_of_kubeflow_takes_the_command_that_is_printed(tmp_path, monkeypatch, retrain):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    output = tmp_path / "my steps.yaml"
    asked = ["kubeflow", "--image", "htr", "--output", str(output), *(["--retrain"] if retrain else [])]
    bootstrap_project(ROOT)
    monkeypatch.chdir(ROOT)
    printed = CliRunner().invoke(cli, asked, catch_exceptions=False).output
    assert f"Steps in {output}: " in printed
    command = shlex.split(next(line for line in printed.splitlines() if line.startswith("  kfp ")))
    group = recurring_run if retrain else run
    assert command[:5] == ["kfp", "--endpoint", "ADDRESS", group.name, "create"]
    client = Client()
    done = CliRunner().invoke(group, command[4:], obj={"client": client, "output": "json"})
    assert client.asked, done.output
    if retrain:
        assert client.asked["enabled"] is True
        assert client.asked["params"] == {"params": "source.path=..."}
        container = executor(next(yaml.safe_load_all(output.read_text(encoding="utf-8"))), "retraining")
        assert container["command"] == ["kedro", "schedule", "--env", "finetune"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--params", "training.epochs", "must contain a key and a value separated by `=`"),
        ("--output", "/proc/htr.yaml", "--output /proc/htr.yaml: the file cannot be written"),
        ("--gpus", "1001", "is not in the range"),
    ],
)
def test_options_that_cannot_be_are_a_sentence(tmp_path, monkeypatch, option, value, message):
    bootstrap_project(ROOT)
    monkeypatch.chdir(ROOT)
    given = {"--image": "htr", "--tracking-uri": SERVER, "--output": str(tmp_path / "htr.yaml"), option: value}
    done = CliRunner().invoke(cli, ["kubeflow", *(word for pair in given.items() for word in pair)])
    assert done.exit_code in (1, 2)
    assert message in done.output


def test_commands_that_need_no_kubeflow_do_not_load_it():
    code = "import sys, htr_pipeline.cli, htr_pipeline.orchestration.kubeflow; sys.exit('kfp' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
