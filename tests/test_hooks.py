import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pyarrow as pa
import pytest
from kedro.framework.hooks import hook_impl
from kedro.framework.hooks.manager import _create_hook_manager
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Node, Pipeline

from htr_pipeline.core.config import UserError
from htr_pipeline.hooks import CheckpointHook, InterruptHook, LockHook, MlflowHook, SettingsHook, _command, _flat
from htr_pipeline.io.checkpoints import FileCheckpoints
from htr_pipeline.pipelines.training.nodes import CheckpointConfig


class Run:
    """A session of Kedro's, as its hooks see it; the functions are called as hooks of the same names."""

    def __init__(self, project, *hooks, asked=None, **functions):
        self._hooks, self._asked = _create_hook_manager(), asked or {}
        settings = {"mlflow": {"tracking_uri": "sqlite:///mlflow.db", "artifact_path": "mlruns", "experiment": "test"}}
        settings["parameters"] = {"validation": {"docs_path": "validation"}}
        context = SimpleNamespace(project_path=project, env="test", params={}, config_loader=Loader(settings))
        if functions:
            hooks += (SimpleNamespace(**{name: hook_impl(function) for name, function in functions.items()}),)
        for hook in hooks:
            self._hooks.register(hook)
        self._hooks.hook.after_context_created(context=context)

    def begin(self):
        self._call("before_pipeline_run")

    def end(self):
        self._call("after_pipeline_run", run_result={})

    def begin_and_end(self):
        self.begin()
        self.end()

    def fail(self):
        self._call("on_pipeline_error", error=ValueError())

    def begin_node(self):
        self._hooks.hook.before_node_run(node=None, catalog=None, inputs={}, is_async=False, run_id="1")

    def _call(self, name, **arguments):
        getattr(self._hooks.hook, name)(
            run_params=self._asked, pipeline=Pipeline([]), catalog=DataCatalog({}), **arguments
        )


class Loader(dict):
    runtime_params = None


def refuse():
    raise UserError("no")


LOSES_CTRL_C = """
import os, signal
from htr_pipeline.hooks import InterruptHook
from tests.test_hooks import Run

class Destructed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
run = Run(None, InterruptHook())
run.begin()
run.begin_node()
Destructed()
print("Python goes on", flush=True)
try:
    run.begin_node()
except KeyboardInterrupt:
    run.begin()
    run.begin_node()
    run.END()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        print("ended, and begun once more", flush=True)
"""


@pytest.mark.parametrize("end", ["end", "fail"])
def test_ctrl_c_that_python_forgets_ends_the_run_before_the_next_node(end):
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    script = LOSES_CTRL_C.replace("END", end)
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert "KeyboardInterrupt" in done.stderr
    assert done.stdout.splitlines() == ["Python goes on", "ended, and begun once more"], done.stderr


def test_ctrl_c_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run = Run(None, InterruptHook())
        run.begin()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        run.end()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("end", [Run.end, Run.fail])
def test_lock_is_free_again_after_the_run_however_it_ends(tmp_path, end):
    first, second = Run(tmp_path, LockHook()), Run(tmp_path, LockHook())
    first.begin()
    with pytest.raises(UserError, match=r"Another run is writing into .*data \(process \d+, since 20"):
        second.begin()
    end(first)
    second.begin()
    end(second)


@pytest.mark.parametrize("name", ["before_pipeline_run", "after_pipeline_run"])
def test_a_hook_that_fails_leaves_no_lock_and_the_folder_as_it_was(tmp_path, monkeypatch, name):
    project, caller = tmp_path / "project", tmp_path / "caller"
    for folder in (project, caller):
        folder.mkdir()
    monkeypatch.chdir(caller)
    run = Run(project, LockHook(), SettingsHook(), **{name: refuse})
    with pytest.raises(UserError, match="no"):
        run.begin_and_end()
    assert Path.cwd() == caller
    Run(project, LockHook()).begin()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder beside that of the caller, with an MLflow of its own."""
    folder, caller = tmp_path / "project", tmp_path / "caller"
    for each in (folder, caller):
        each.mkdir()
    monkeypatch.chdir(caller)
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "HTR_JOINT_RUN", "HTR_GIT_COMMIT"):
        monkeypatch.delenv(name, raising=False)
    uri = mlflow.get_tracking_uri()
    yield folder
    mlflow.end_run()
    mlflow.set_tracking_uri(uri)


def test_after_a_run_that_ctrl_c_has_left_in_a_notebook_the_next_one_goes_on_in_it(project):
    caller = Path.cwd()
    run = Run(project, LockHook(), SettingsHook(), MlflowHook())
    run.begin()
    left = mlflow.active_run().info.run_id
    run.begin()  # Kedro has told no hook that the first one ended
    assert mlflow.active_run().info.run_id == left
    run.end()
    assert Path.cwd() == caller
    assert mlflow.get_run(left).info.status == "FINISHED"


@pytest.mark.parametrize("left", ["{}", "[]", '{"run_id": "a"}', "no json"])
def test_a_damaged_note_of_the_last_run_counts_as_none(project, left):
    (project / "data").mkdir()
    (project / "data/.mlflow_run.json").write_text(left, encoding="utf-8")
    run = Run(project, LockHook(), SettingsHook(), MlflowHook())
    run.begin_and_end()


def test_processes_with_one_name_or_id_of_a_run_write_into_it(project, monkeypatch):
    def done(*pipelines, **variables):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            run = Run(project, MlflowHook(), asked={"pipeline_names": pipelines})
            run.begin()
            run_id = mlflow.active_run().info.run_id
            run.end()
        return mlflow.get_run(run_id)

    first = done("training", HTR_JOINT_RUN="3a6e-90b3")
    assert first.info.run_name == "kedro run"
    other, alone = done("training", HTR_JOINT_RUN="job/2"), done("training")
    joined = done("evaluation", HTR_JOINT_RUN="3a6e-90b3", HTR_GIT_COMMIT="f" * 40)
    last = done("reporting", MLFLOW_RUN_ID=first.info.run_id, HTR_JOINT_RUN="job/2")
    assert len({run.info.run_id for run in (first, other, alone)}) == 3
    assert first.info.run_id == joined.info.run_id == last.info.run_id
    assert last.data.tags["pipelines"] == "training, evaluation, reporting"
    words = [f"kedro run --pipelines {name}" for name in ("training", "evaluation", "reporting")]
    assert last.data.tags["command"] == " && ".join(words)
    with monkeypatch.context() as patch:
        patch.setenv("HTR_JOINT_RUN", "killed")
        run = Run(project, MlflowHook())
        run.begin()
        killed = mlflow.active_run().info.run_id
        mlflow.end_run("RUNNING")  # as a process leaves it that is killed
    done("training", HTR_JOINT_RUN="job/3")
    assert mlflow.get_run(killed).info.status == "KILLED"
    with pytest.raises(UserError, match=r"HTR_JOINT_RUN=it's: expected at most 250 letters, digits and any of"):
        done(HTR_JOINT_RUN="it's")


def test_a_server_that_does_not_answer_is_asked_three_times(project, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:S3cret@127.0.0.1:9")
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9: .* that of MLFLOW_TRACKING_URI in the"):
        Run(project, MlflowHook()).begin()
    retries = [record for record in caplog.records if record.getMessage().startswith("Retrying (Retry(")]
    assert len(retries) == 2
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


@pytest.mark.parametrize(
    ("given", "commit", "changes"),
    [("5" * 40, "5" * 40, "none"), ("5" * 40 + "-dirty", "5" * 40, "uncommitted changes"), ("", "unknown", "unknown")],
)
def test_where_there_is_no_git_the_environment_names_the_commit(project, monkeypatch, given, commit, changes):
    monkeypatch.setenv("HTR_GIT_COMMIT", given)
    run = Run(project, MlflowHook())
    run.begin()
    tags = mlflow.get_run(mlflow.active_run().info.run_id).data.tags
    assert (tags["git_commit"], tags["git_changes"]) == (commit, changes)
    run.end()


@pytest.mark.parametrize(
    ("output", "fingerprint", "ended_by", "stays"),
    [
        ("history", "new", "epochs", False),
        ("history", "new", "interrupt", True),  # the same command goes on
        ("history", "old", "epochs", True),  # an old history, the checkpoint is of another training
        ("report", "new", "epochs", True),  # no training in this run
    ],
)
def test_checkpoint_of_a_complete_training_is_removed_after_the_run(tmp_path, output, fingerprint, ended_by, stays):
    path = tmp_path / "checkpoint.npz"
    FileCheckpoints(path, "new").save({}, {})
    history = pa.table({}).replace_schema_metadata({"ended_by": ended_by, "fingerprint": fingerprint})
    given = {"history": history, "params:checkpoint": CheckpointConfig(path=str(path))}
    catalog = DataCatalog({name: MemoryDataset(data, copy_mode="assign") for name, data in given.items()})
    pipeline = Pipeline([Node(lambda: None, None, output)])
    CheckpointHook().after_pipeline_run(pipeline, catalog)
    assert path.exists() is stays


def test_the_command_of_a_run_starts_it_again():
    asked = {
        "env": "test",
        "tags": ("a b", "c"),
        "from_inputs": ["features"],
        "only_missing_outputs": True,
        "runtime_params": {"training": {"epochs": 3}, "report": {"title": "My lines"}},
    }
    command = "kedro run --env test --tags 'a b,c' --from-inputs features --only-missing-outputs"
    assert _command(asked) == f"{command} --params 'training.epochs=3,report.title=My lines'"
    assert _command({"pipeline_names": ["b", "a"]}) == _command({"pipeline_names": ["a", "b"]})
    fonts = {"demo": {"heldout_fonts": ["delius", "satisfy"]}}
    assert (
        _command({"runtime_params": fonts}) == "kedro run  # and demo.heldout_fonts, whose commas --params cannot hold"
    )


def test_words_are_one_parameter_of_mlflow_however_many_there_are():
    few = {"decoding": {"hot_words": {"l'État": 3.0}, "looks": 3}}
    flat = {"decoding.hot_words": '{"l\'État": 3.0}', "decoding.looks": 3}
    assert _flat(few, whole=("hot_words",)) == flat
    many = {"hot_words": {f"word{'x' * 20}{index}": 1.0 for index in range(900)}}
    assert _flat(many, whole=("hot_words",))["hot_words"].startswith("900 entries, SHA-256 ")


def test_a_block_without_settings_is_named_and_a_part_of_a_block_is_one_of_it():
    hook = SettingsHook()
    hook._params = {"training": {"epochs": 1}}
    hook._look_for_files(Pipeline([Node(print, "params:training.epochs", "printed")]))
    with pytest.raises(UserError, match=r"conf/ has no settings of model\. Fetch its files anew"):
        hook._look_for_files(Pipeline([Node(print, ["params:training", "params:model"], "printed")]))
