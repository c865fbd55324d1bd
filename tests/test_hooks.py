from types import SimpleNamespace

import pyarrow as pa
import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Node, Pipeline

from htr_pipeline.core.config import UserError
from htr_pipeline.hooks import CheckpointHook, LockHook, _command, _flat
from htr_pipeline.io.checkpoints import FileCheckpoints
from htr_pipeline.pipelines.training.nodes import CheckpointConfig


@pytest.mark.parametrize("end", ["after_pipeline_run", "on_pipeline_error"])
def test_lock_is_free_again_after_the_run_however_it_ends(tmp_path, end):
    first, second = LockHook(), LockHook()
    for hook in (first, second):
        hook.after_context_created(SimpleNamespace(project_path=tmp_path))
    first.before_pipeline_run()
    with pytest.raises(UserError, match=r"Another run is writing into .*data \(process \d+, since 20"):
        second.before_pipeline_run()
    getattr(first, end)()
    second.before_pipeline_run()
    getattr(second, end)()


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
