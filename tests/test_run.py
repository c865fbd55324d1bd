"""The project as a user runs it: real processes on a toy data set, in a folder of their own."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, url2pathname, urlopen

import nbformat
import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from kedro.io import DataCatalog, MemoryDataset
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, RESOURCE_DOES_NOT_EXIST
from nbclient import NotebookClient

from htr_pipeline.core.config import UserError
from htr_pipeline.core.image import ImageConfig
from htr_pipeline.io.starting_point import StartingPoint
from htr_pipeline.pipelines import registration
from htr_pipeline.pipelines.registration import nodes
from htr_pipeline.pipelines.registration.nodes import RegistrationConfig, find_champion
from tests.project import (
    KEDRO,
    ROOT,
    artifact,
    catalog,
    client,
    environment,
    kedro_run,
    kedro_transcribe,
    mlflow_runs,
    mtimes,
    new_project,
    read_json,
    serving,
    started_run,
    succeed,
    weights,
)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A project in which everything was run once; tests must leave its files as they are."""
    project = new_project(tmp_path_factory.mktemp("toy") / "project")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "toy"], cwd=project, check=True)
    return SimpleNamespace(project=project, output=succeed(project))


@pytest.fixture
def project(toy, tmp_path):
    """A copy of the toy project, with its data, runs and registered model, that a test may change."""
    return shutil.copytree(toy.project, tmp_path / "project")


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_whole_run_makes_every_output_of_the_catalog_and_leaves_no_partial_file(toy):
    missing = [name for name, path in catalog(toy.project).items() if not path.exists()]
    assert missing == []
    hidden = [path.name for path in (toy.project / "data").rglob(".*")]
    assert hidden == [".lock"]
    assert not (toy.project / "data/06_models/checkpoint.npz").exists()


def test_whole_run_ends_with_the_error_rate_and_the_places_of_the_results(toy):
    score = read_json(catalog(toy.project)["metrics"])["splits"]["test"]["beam_lm"]
    assert f"CER {score['cer']:.2%}" in toy.output
    assert "data/08_reporting/report.html" in toy.output
    assert "models:/htr/1" in toy.output
    assert mlflow_runs(toy.project)[0].info.run_id in toy.output


def test_tables_are_read_by_plain_pandas(toy):
    paths = catalog(toy.project)
    frames = {name: pd.read_parquet(path) for name, path in paths.items() if path.suffix == ".parquet"}
    features = pd.read_parquet(paths["features"], partitioning=None)
    lines = {"train": 4 * 8, "validation": 2 * 4, "test": 4 * 4}
    assert frames["manifest"]["split"].value_counts().to_dict() == lines
    assert features["split"].value_counts().to_dict() == lines
    assert set(features["line_id"]) == set(frames["manifest"]["line_id"])
    assert all(len(row.pixels) == row.width_pixels * row.height_pixels for row in features.itertuples())
    assert len(frames["history"]) == 2
    assert set(frames["predictions"]["decoder"]) == {"greedy", "beam", "beam_lm"}
    assert not set(frames["predictions"]["split"]) - {"validation", "test"}


def test_mlflow_has_one_finished_run_with_parameters_metrics_tags_and_artifacts(toy):
    runs = mlflow_runs(toy.project)
    assert len(runs) == 1
    info, data = runs[0].info, runs[0].data
    assert info.status == "FINISHED"
    assert (data.params["training.epochs"], data.params["model.size"]) == ("2", "XS")
    assert data.params["training.learning_rate"] == "0.006"  # not in conf/test: from conf/base
    metrics = read_json(catalog(toy.project)["metrics"])["splits"]
    assert data.metrics["test_cer_greedy"] == metrics["test"]["greedy"]["cer"]
    assert data.metrics["validation_wer_beam"] == metrics["validation"]["beam"]["wer"]
    assert data.metrics["num_lines_train"] == 32
    assert {"train_loss", "validation_cer", "lines_per_second"} <= data.metrics.keys()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=toy.project, capture_output=True, text=True, check=True)
    assert data.tags["git_commit"] == head.stdout.strip()
    assert data.tags["data_hash"] == read_json(catalog(toy.project)["feature_stats"])["data_hash"]
    assert data.tags["command"] == "kedro run --env test"
    assert data.tags["network_size"] == "XS"
    assert data.tags["precision"] in ("float32", "mixed_bfloat16")
    registration = read_json(catalog(toy.project)["registration"])
    assert registration["run_id"] == info.run_id
    assert registration["tracking_uri"] == "sqlite:///mlflow.db"
    assert all(registration[tag] == data.tags[tag] for tag in ("git_commit", "git_changes", "command"))
    artifacts = {artifact.path for artifact in client(toy.project).list_artifacts(info.run_id)}
    assert {"report.html", "validation", "learning_curves.svg", "samples.json"} <= artifacts
    read = artifact(runs[0], "samples.json")
    assert {sample["epoch"] for sample in json.loads(read)} == {1, 2}
    assert {sample["reference"] for sample in json.loads(read)} <= set(
        pd.read_parquet(catalog(toy.project)["manifest"])["text"]
    )
    assert artifact(runs[0], "learning_curves.svg") == catalog(toy.project)["learning_curves"].read_text()
    docs = {artifact.path for artifact in client(toy.project).list_artifacts(info.run_id, "validation")}
    assert "validation/summary.html" in docs


PREDICT = """
import json, sys
from pathlib import Path
import mlflow
import pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/htr@champion")
good, broken = sys.argv[2:]
answers = {
    "path": model.predict(pd.DataFrame({"image": [good, broken]})),
    "bytes": model.predict(pd.DataFrame({"image": [Path(good).read_bytes(), Path(broken).read_bytes()]})),
    "list": model.predict([good, broken]),
    "column": model.predict(pd.DataFrame({"id": [7, 8], "image": [good, broken], "page": ["a.png", "b.png"]})),
    "beam": model.predict(pd.DataFrame({"image": [good]}), params={"decoder": "beam", "beam_width": 3}),
    "greedy": model.predict(pd.DataFrame({"image": [good]}), params={"decoder": "greedy"}),
}
print(json.dumps({name: json.loads(answer.to_json(orient="records")) for name, answer in answers.items()}))
"""


_PRINT_PATH_OF_MODEL = """
from htr_pipeline.io.starting_point import StartingPoint
path = StartingPoint.find("models:/htr@champion").model_path
assert path.exists()
print(path)
"""


def test_training_can_start_from_an_alias_and_knows_its_version(toy, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{toy.project / 'mlflow.db'}")
    start = StartingPoint.find("models:/htr@champion")
    assert start.name == "models:/htr/1"
    assert start.charset().to_json() == catalog(toy.project)["charset"].read_text(encoding="utf-8")
    assert StartingPoint.find("models:/htr/1/").content_hash() == start.content_hash()
    assert StartingPoint.find("models:/htr/latest").name == "models:/htr/1"
    kept = subprocess.run(
        [sys.executable, "-c", _PRINT_PATH_OF_MODEL], capture_output=True, text=True, timeout=100, check=True
    ).stdout.strip()
    assert kept.endswith("network.keras")
    assert not Path(kept).exists()  # a download goes with its process


def test_champion_reads_paths_and_bytes_in_a_fresh_process_and_reports_a_broken_image(toy, tmp_path):
    manifest = pd.read_parquet(catalog(toy.project)["manifest"])
    predictions = pd.read_parquet(catalog(toy.project)["predictions"]).set_index(["decoder", "line_id"])
    line = manifest[manifest["split"] == "test"].iloc[0]
    good, broken = toy.project / "data/01_raw/demo" / line["image_path"], tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:100])
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, f"sqlite:///{toy.project / 'mlflow.db'}", str(good), str(broken)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    expected = predictions.loc[("beam_lm", line["line_id"])]
    for kind in ("path", "bytes", "list", "column"):
        first, second = answers[kind]
        assert first["text"] == expected["hypothesis"]
        assert first["confidence"] == pytest.approx(expected["confidence"], rel=1e-3)
        assert first["error"] is None
        assert (second["text"], second["confidence"]) == (None, None)
        assert "the image cannot be decoded" in second["error"]
    assert str(broken) in answers["path"][1]["error"]
    assert answers["beam"][0]["error"] is None
    assert answers["greedy"][0]["text"] == predictions.loc[("greedy", line["line_id"])]["hypothesis"]


@pytest.fixture
def server(toy):
    """Address of a server like that of `make serve`."""
    arguments = ("models", "serve", "--model-uri", "models:/htr@champion", "--env-manager", "local")
    with serving(
        toy.project, "/ping", arguments, MLFLOW_TRACKING_URI=f"sqlite:///{toy.project / 'mlflow.db'}"
    ) as address:
        yield address


def test_served_model_reads_images_of_requests_and_no_files_of_the_server(toy, server):
    def post(content):
        request = Request(f"{server}/invocations", json.dumps(content).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            return json.loads(answer.read(), parse_constant=pytest.fail)["predictions"]  # NaN is no JSON

    def ask(images, **params):
        return post({"dataframe_split": {"columns": ["image"], "data": [[i] for i in images]}, "params": params})

    manifest = pd.read_parquet(catalog(toy.project)["manifest"])
    predictions = pd.read_parquet(catalog(toy.project)["predictions"]).set_index(["decoder", "line_id"])
    line = manifest[manifest["split"] == "test"].iloc[0]
    path = toy.project / "data/01_raw/demo" / line["image_path"]
    image = base64.b64encode(path.read_bytes()).decode()
    good, *others = ask([image, str(path), base64.b64encode(b"no image").decode()])
    assert good["text"] == predictions.loc[("beam_lm", line["line_id"])]["hypothesis"]
    assert good["error"] is None
    assert [other["text"] for other in others] == [None, None]
    assert "the image must be the base64 text of a PNG, JPEG or TIFF file" in others[0]["error"]
    assert "not an image in one of the formats PNG, JPEG, TIFF" in others[1]["error"]
    (greedy,) = ask([image], decoder="greedy")
    assert greedy["text"] == predictions.loc[("greedy", line["line_id"])]["hypothesis"]
    assert ask([image], looks=1)[0]["error"] is None
    assert ask([base64.encodebytes(path.read_bytes()).decode()], alpha=None) == [good]
    for content in (
        {"dataframe_split": {"columns": ["id", "image"], "data": [[7, image]]}},
        {"dataframe_records": [{"page": "7", "image": image}]},
        {"instances": [image]},
        {"instances": [{"image": image}]},
        {"inputs": [image]},
        {"inputs": {"image": [image]}},
    ):
        assert post(content) == [good], content
    assert post({"inputs": []}) == post({"dataframe_records": []}) == []
    with pytest.raises(HTTPError) as refused:
        post({"dataframe_split": {"columns": ["id", "scan"], "data": [[7, image]]}})
    assert "The columns are id, scan: expected a column image" in json.loads(refused.value.read())["message"]
    with pytest.raises(HTTPError) as refused:
        ask([image], decoder="beamlm")
    answer = json.loads(refused.value.read())
    assert (refused.value.code, answer["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert "decoding.decoder = 'beamlm': expected one of 'greedy', 'beam', 'beam_lm'" in answer["message"]


# --- parts of it, from what is on disk -------------------------------------------------------------------------------


def test_only_missing_outputs_and_reporting_rebuild_the_report_alone(project):
    paths = catalog(project)
    old = mtimes(paths)
    paths["report"].unlink()
    succeed(project, "--only-missing-outputs")
    rebuilt = mtimes(paths)
    assert {name for name, mtime in rebuilt.items() if mtime != old[name]} == {"report"}
    succeed(project, "--pipeline", "reporting")
    assert {name for name, mtime in mtimes(paths).items() if mtime != rebuilt[name]} == {"report"}


def test_second_run_on_the_same_data_gives_the_same_network_and_leaves_the_champion(project):
    paths = catalog(project)
    before, predictions = weights(paths["model"]), pd.read_parquet(paths["predictions"])
    shards = {path: path.read_bytes() for path in sorted(paths["features"].rglob("*.parquet"))}
    succeed(project)
    after = weights(paths["model"])
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
    pd.testing.assert_frame_equal(pd.read_parquet(paths["predictions"]), predictions)
    assert {path: path.read_bytes() for path in sorted(paths["features"].rglob("*.parquet"))} == shards
    store = client(project)
    assert {str(version.version) for version in store.search_model_versions("name = 'htr'")} == {"1", "2"}
    assert str(store.get_model_version_by_alias("htr", "champion").version) == "1"
    registration = read_json(paths["registration"])
    assert (registration["version"], registration["promoted"], registration["champion_version"]) == ("2", False, "1")
    assert "not better" in registration["reason"]
    assert [run.info.status for run in mlflow_runs(project)] == ["FINISHED", "FINISHED"]


def test_a_network_that_was_not_measured_is_not_registered_with_figures_of_another(project):
    succeed(project, "--pipelines", "training", "--params", "training.epochs=1,training.seed=2")
    with pytest.raises(UserError, match="The metrics were measured with another network"):
        registered(project)
    assert num_versions(project) == 1
    paths = catalog(project)
    old = mtimes(paths)
    succeed(project, "--from-nodes", "read_lines", "--params", "training.epochs=1")
    changed = {name for name, mtime in mtimes(paths).items() if mtime != old[name]}
    evaluation = {"tuned_decoding", "readings", "calibration", "predictions", "metrics"}
    assert changed == {*evaluation, "registration", "report"}
    page = paths["report"].read_text(encoding="utf-8")
    assert "of another network" not in page
    assert "kedro run --env test --from-nodes read_lines --params training.epochs=1" in page


def registered(project, run_id=None, alias="champion", **features):
    """What the node of the registration gives, within this process, which saves half a minute of imports a test."""
    import mlflow

    entries = yaml.safe_load((project / "conf/base/catalog.yml").read_text(encoding="utf-8"))
    tables = DataCatalog.from_config(
        {name: entry | {"filepath": str(project / entry["filepath"])} for name, entry in entries.items()}
    )
    tables["params:features"] = MemoryDataset(ImageConfig(**{"height_pixels": 32} | features))
    tables["params:registration"] = MemoryDataset(RegistrationConfig(alias=alias))
    (node,) = registration.create_pipeline().nodes
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{project / 'mlflow.db'}")
    try:
        mlflow.set_experiment("htr_pipeline")
        with contextlib.chdir(project), mlflow.start_run(run_id=run_id):
            return node.run({name: tables.load(name) for name in node.inputs})["registration"]
    finally:
        mlflow.set_tracking_uri(before)


def num_versions(project):
    return len(client(project).search_model_versions("name = 'htr'"))


def new_champion(project, name, change):
    """Makes a copy of version 1 the champion, one artifact of it changed, and without tags."""
    store = client(project)
    source = Path(url2pathname(urlparse(store.get_model_version_download_uri("htr", "1")).path))
    copy = Path(shutil.copytree(source, project / f"changed {name}"))
    path = copy / "artifacts" / name
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    number = store.create_model_version("htr", source=copy.as_uri()).version
    store.set_registered_model_alias("htr", "champion", number)


def test_a_model_is_not_registered_with_other_settings_of_lines_than_it_was_measured_with(project):
    with pytest.raises(UserError, match="other settings of features than this run has: binarise = False, here True"):
        registered(project, binarise=True)
    assert num_versions(project) == 1


def test_a_champion_of_another_run_meanwhile_is_compared_with_too(project, monkeypatch):
    store, log_model = client(project), nodes._log_model
    store.set_model_version_tag("htr", "1", "cer", "9.9")

    def while_another_run_registers(*arguments):
        logged = log_model(*arguments)
        source = store.get_model_version("htr", "1")
        number = store.create_model_version("htr", source.source, tags=source.tags | {"cer": "0.001"}).version
        store.set_registered_model_alias("htr", "champion", number)
        return logged

    monkeypatch.setattr(nodes, "_log_model", while_another_run_registers)
    result = registered(project)
    assert (result["version"], result["promoted"], result["champion_version"]) == ("3", False, "2")
    assert store.get_model_version_by_alias("htr", "champion").version in ("2", 2)


def test_another_alias_begins_anew_beside_the_champion(project):
    result = registered(project, alias="production")
    assert (result["version"], result["promoted"], result["reason"]) == ("2", True, "no version had this alias yet")
    store = client(project)
    aliases = {name: store.get_model_version_by_alias("htr", name).version for name in ("champion", "production")}
    assert {name: str(version) for name, version in aliases.items()} == {"champion": "1", "production": "2"}


def test_a_run_that_was_killed_behind_its_registration_does_not_register_again(project):
    (run,) = mlflow_runs(project)
    before = read_json(catalog(project)["registration"])
    again = registered(project, run_id=run.info.run_id)  # as the same command after kill -9 has it
    different = {"reason": "it became champion before this run was interrupted"}
    assert again == before | different
    assert num_versions(project) == 1


def test_a_champion_that_has_learnt_the_test_lines_is_not_compared_with(project):
    features = pd.read_parquet(project / "data/04_feature/features/split=test", partitioning=None)
    hashes = features["content_hash"].str[:16].tolist()
    new_champion(project, "provenance.json", lambda text: json.dumps(json.loads(text) | {"learnt_lines": hashes[:3]}))
    result = registered(project)
    assert f"version 2 stays champion, but was trained on 3 of the {len(hashes)} test lines" in result["reason"]
    assert (result["version"], result["promoted"], result["champion_version"]) == ("3", False, "2")
    # A manifest that is newer than the features has other lines than the new model was measured on.
    path = catalog(project)["manifest"]
    manifest = pq.read_table(path, partitioning=None)
    pq.write_table(manifest.filter(pc.field("line_id") != features["line_id"][0]), path)
    with pytest.raises(UserError, match="The test lines of the manifest are not those that the new model was measured"):
        registered(project)


def test_a_champion_that_cannot_read_is_not_compared_with(project):
    def other_height(text):
        settings = json.loads(text)
        return json.dumps(settings | {"features": settings["features"] | {"height_pixels": 48}})

    new_champion(project, "settings.json", other_height)
    result = registered(project)
    assert "version 2 stays champion, but could not read lines" in result["reason"]
    assert (result["version"], result["promoted"]) == ("3", False)


def test_a_champion_is_read_by_the_code_of_today(project):
    new_champion(project, "lexicon.txt", lambda text: text)
    code = project / "changed lexicon.txt" / "mlflow_model.py"
    assert "class LineReader" in code.read_text(encoding="utf-8")
    code.write_text("raise RuntimeError('of an earlier version')", encoding="utf-8")
    result = registered(project)
    assert result["champion_cer"] == result["candidate_cer"] is not None
    assert (result["version"], result["promoted"]) == ("3", False)


def test_a_champion_that_cannot_be_loaded_stays_and_the_new_version_is_kept(project, caplog):
    store = client(project)
    number = store.create_model_version("htr", source=(project / "nowhere").as_uri()).version
    store.set_registered_model_alias("htr", "champion", number)
    result = registered(project)
    assert re.search(r"version 2 stays champion, but could not read lines, from .*nowhere", result["reason"])
    assert "set_registered_model_alias('htr', 'champion', '3')" in caplog.text
    assert str(store.get_model_version_by_alias("htr", "champion").version) == "2"
    assert (result["version"], result["promoted"], result["champion_version"]) == ("3", False, "2")
    tags = store.get_model_version("htr", "3").tags
    assert tags["test_hash"] == read_json(catalog(project)["metrics"])["test_hash"]
    assert {"signature", "data_hash", "cer"} <= tags.keys()


def test_a_registry_that_does_not_answer_is_not_one_without_a_champion():
    from mlflow.exceptions import MlflowException

    def answer(code):
        def refuse(_):
            raise MlflowException("no", code)

        return SimpleNamespace(get_registered_model=refuse)

    assert find_champion(answer(RESOURCE_DOES_NOT_EXIST), RegistrationConfig()) is None
    with pytest.raises(MlflowException):
        find_champion(answer(PERMISSION_DENIED), RegistrationConfig())
    no_alias = SimpleNamespace(get_registered_model=lambda _: SimpleNamespace(aliases={"other": "1"}))
    assert find_champion(no_alias, RegistrationConfig()) is None


def test_the_notebook_runs_on_the_tables_of_the_catalog(toy):
    notebook = nbformat.read(ROOT / "notebooks" / "01_where_are_the_errors.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(toy.project)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("on 16 lines" in str(output) for output in outputs)


def test_a_folder_of_lines_goes_through_everything_and_the_champion_reads_its_test_lines(project):
    demo = project / "data/01_raw/demo"
    for row in pd.read_csv(demo / "lines.tsv", sep="\t", quoting=3, dtype=str).itertuples():
        folder = project / "my_lines" / row.writer
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(demo / row.image, folder / f"{row.id}.png")
        (folder / f"{row.id}.gt.txt").write_text(row.text + "\n", encoding="utf-8")
    (project / "my_lines" / "broken.png").write_bytes(b"no image")
    output = succeed(project, "--params", "source.path=my_lines,training.epochs=1")
    assert "it reads the present ones" in output
    paths = catalog(project)
    manifest = pd.read_parquet(paths["manifest"])
    assert len(manifest) == 56
    assert manifest.groupby("writer_id")["split"].nunique().max() == 1
    assert manifest["group"].isna().all()
    assert pd.read_parquet(paths["rejected_lines"])["file"].tolist() == ["broken.png"]
    assert read_json(paths["metrics"])["groups"] == []
    assert read_json(paths["registration"])["champion_cer"] is not None


# --- interruption ----------------------------------------------------------------------------------------------------


def checkpoint_step(path):
    """Steps that the checkpoint has behind it, 0 without one."""
    if not path.exists():
        return 0
    with np.load(path) as file:
        return json.loads(file["header"].tobytes())["state"]["step"]


def test_training_goes_on_after_sigkill_in_the_same_mlflow_run_with_the_same_result(project):
    paths, checkpoint = catalog(project), project / "data/06_models/checkpoint.npz"
    command = ("--pipeline", "training", "--params", "training.checkpoint_seconds=0.0,training.epochs=4")
    succeed(project, *command)
    expected, history = weights(paths["model"]), pd.read_parquet(paths["history"])
    num_runs, old = len(mlflow_runs(project)), mtimes(paths)

    # Six steps of 16: in the middle of the second epoch.
    with started_run(project, *command, until=lambda process: checkpoint_step(checkpoint) >= 6) as process:
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 6 <= checkpoint_step(checkpoint) < 16
    killed_run = read_json(project / "data/.mlflow_run.json")["run_id"]
    assert mtimes(paths)["model"] == old["model"]

    output = succeed(project, *command)
    assert f"Going on in the MLflow run {killed_run}" in output
    assert not checkpoint.exists()
    runs = mlflow_runs(project)
    assert len(runs) == num_runs + 1
    assert (runs[0].info.run_id, runs[0].info.status) == (killed_run, "FINISHED")
    actual = weights(paths["model"])
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)
    epochs = [sample["epoch"] for sample in json.loads(artifact(runs[0], "samples.json"))]
    assert {epoch: epochs.count(epoch) for epoch in epochs} == dict.fromkeys(range(1, 5), 5)
    timeless = ["epoch", "step", "train_loss", "train_cer", "validation_loss", "validation_cer", "learning_rate"]
    pd.testing.assert_frame_equal(pd.read_parquet(paths["history"])[timeless], history[timeless])


def test_paths_of_settings_mean_the_projects_folder_wherever_the_run_is_started(project):
    folder = project / "notebooks" / "deep"
    folder.mkdir(parents=True)
    command = ("--pipeline", "data_validation", "--params", "validation.docs_path=data/check")
    done = subprocess.run(
        [*KEDRO, *command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (project / "data/check/summary.html").exists()
    assert not list(folder.iterdir())


def test_settings_of_the_machine_hold_with_an_environment(project):
    settings = {"decoding": {"hot_words": {"l'État": 3.0}}, "report": {"title": "Mine"}}
    (project / "conf/local/parameters.yml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    succeed(project, "--pipeline", "reporting")
    run = mlflow_runs(project)[0]
    assert run.data.params["decoding.hot_words"] == '{"l\'État": 3.0}'
    assert (run.data.params["report.title"], run.data.params["training.epochs"]) == ("Mine", "2")
    assert "<title>Mine" in artifact(run, "report.html")


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_what_is_killed_after_the_training_does_not_train_again(project, sign):
    paths, checkpoint = catalog(project), project / "data/06_models/checkpoint.npz"
    settings = "training.epochs=2,training.start_from=models:/htr@champion"
    command = ("--from-nodes", "collect_charset", "--params", settings)
    old = mtimes(paths)["history"]
    with started_run(project, *command, until=lambda process: mtimes(paths)["history"] != old) as process:
        os.killpg(process.pid, sign)
        assert process.wait() == (1 if sign == signal.SIGINT else -sign)
    assert checkpoint.exists()
    trained, killed_run = weights(paths["model"]), read_json(project / "data/.mlflow_run.json")["run_id"]
    status = mlflow_runs(project)[0].info.status
    assert status == ("KILLED" if sign == signal.SIGINT else "RUNNING")
    # As if the run had been killed behind its registration: the alias leads to another network now.
    new_champion(project, "charset.json", lambda text: text.replace('"characters": [', '"characters": ["§",'))

    output = succeed(project, *command)
    assert "models:/htr@champion is models:/htr/1." in output
    assert f"Going on in the MLflow run {killed_run}" in output
    assert "Epoch 1:" not in output
    assert "Best validation CER" in output
    assert not checkpoint.exists()
    for name, array in weights(paths["model"]).items():
        np.testing.assert_array_equal(array, trained[name], err_msg=name)


def test_second_run_is_refused_while_one_is_at_work_and_sigkill_lets_the_next_one_in(project, tmp_path):
    def has_lock(process):
        return (project / "data/.lock").read_text().startswith(f"{process.pid},")

    report = catalog(project)["report"]
    old = report.stat().st_mtime_ns
    with started_run(project, "--pipeline", "training", "--params", "training.epochs=1000", until=has_lock) as first:
        second = kedro_run(project, "--pipeline", "reporting")
        assert second.returncode == 1
        assert re.search(rf"Error: Another run .* \(process {first.pid}, since 20.*\), .*Wait until", second.stderr)
        assert first.poll() is None
        assert kedro_export(project, "--format", "text", "--output", str(tmp_path / "out")).returncode == 0
        assert report.stat().st_mtime_ns == old
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    succeed(project, "--pipeline", "reporting")


def test_run_goes_through_on_threads_and_on_processes(project):
    succeed(project, "--pipeline", "data_validation", "--runner", "ParallelRunner")
    succeed(project, "--pipeline", "registration", "--runner", "ThreadRunner")
    newest, *others = mlflow_runs(project)
    assert (newest.info.status, len(others)) == ("FINISHED", 2)
    assert read_json(catalog(project)["registration"])["run_id"] == newest.info.run_id


def test_the_gpu_environment_trains_on_a_cpu_too(project):
    small = "model.size=XS,training.epochs=1,training.batch_size=8,training.precision=mixed_bfloat16"
    command = [sys.executable, "-m", "kedro", "run", "--env", "gpu", "--pipeline", "training", "--params", small]
    folder = project / "notebooks"
    folder.mkdir()
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(folder.iterdir())  # a checkpoint least of all: the path of the settings means the project's folder
    parameters = mlflow_runs(project)[0].data.params
    assert parameters["training.distribution"] == "mirrored"
    assert parameters["training.precision"] == "mixed_bfloat16"
    paths = catalog(project)
    assert pd.read_parquet(paths["history"])["step"].to_list() == [4]
    assert all(np.isfinite(array).all() for array in weights(paths["model"]).values())


def test_the_finetune_environment_starts_from_the_network_of_the_package(project):
    small = "training.epochs=1,training.learning_rate=0.0"
    command = [sys.executable, "-m", "kedro", "run", "--env", "finetune", "--pipeline", "training", "--params", small]
    done = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    trained = weights(catalog(project)["model"])
    starter = weights(project / "src" / "htr_pipeline" / "starter" / "model.keras")
    names = [name for name in starter if "lstm" in name]
    assert len(names) == 2 * 2 * 3  # layers, directions, arrays of each
    assert all(np.array_equal(trained[name], starter[name]) for name in names)
    assert "made with other settings of features (height_pixels = 64, here 32" in done.stdout + done.stderr


# --- exports ---------------------------------------------------------------------------------------------------------


def kedro_export(project, *arguments):
    command = [sys.executable, "-m", "kedro", "export", "--env", "test", *arguments]
    return subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=300)


def test_export_writes_what_was_read(toy, tmp_path):
    done = kedro_export(toy.project, "--format", "tsv", "--output", str(tmp_path), "--split", "test")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"Files in {re.escape(str(tmp_path))}.*: 1, for instance", done.stdout)
    predictions = pd.read_parquet(catalog(toy.project)["predictions"])
    read = predictions[(predictions["split"] == "test") & (predictions["decoder"] == "beam_lm")]
    exported = pd.read_csv(tmp_path / "lines.tsv", sep="\t", quoting=3, keep_default_na=False)
    assert dict(zip(exported["line_id"], exported["text"], strict=True)) == dict(
        zip(read["line_id"], read["hypothesis"], strict=True)
    )


def test_export_that_cannot_be_is_a_sentence(toy, tmp_path):
    done = kedro_export(toy.project, "--format", "page", "--output", str(tmp_path))
    assert done.returncode == 1
    assert "Error: None of the lines came from PAGE files, but from: demo" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_export_finds_the_sources_from_any_folder_and_writes_into_none(toy):
    done = kedro_export(toy.project / "conf", "--format", "tsv", "--output", "../data/01_raw/demo/out")
    assert done.returncode == 1
    assert re.search(r"Error: .*data/01_raw/demo/out/lines\.tsv would lie in .*demo, which is a source", done.stderr)
    assert not (toy.project / "data/01_raw/demo/out").exists()


# --- new lines -------------------------------------------------------------------------------------------------------


def test_new_lines_are_read_by_the_champion_as_the_evaluation_reads_them(toy, tmp_path):
    done = kedro_transcribe(toy.project, "data/01_raw/demo", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"Lines read by models:/htr/\d+ \(beam_lm\): 56\.", done.stdout)
    read = pd.read_csv(tmp_path / "out/lines.tsv", sep="\t", quoting=3, keep_default_na=False, index_col="line_id")
    predictions = pd.read_parquet(catalog(toy.project)["predictions"])
    expected = predictions[predictions["decoder"] == "beam_lm"].set_index("line_id")["hypothesis"]
    assert read["text"].reindex(expected.index).to_dict() == expected.to_dict()


# --- retraining ------------------------------------------------------------------------------------------------------


def test_schedule_retrains_from_the_champion_where_lines_are_new(project):
    def schedule(*arguments):
        command = [sys.executable, "-m", "kedro", "schedule", "--env", "test", *arguments]
        return subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=300)

    broken = schedule("--params", "source.path=nowhere")
    assert broken.returncode == 1
    assert "Error: source.path = 'nowhere': there is no such file or folder" in broken.stderr
    failed = schedule("--params", "language_model.arpa=nowhere")
    assert failed.returncode == 1
    assert "The run ended with exit code 1; the same lines count as new at the next look" in failed.stderr
    small = ("--params", "training.epochs=1")
    done = schedule(*small)
    assert done.returncode == 0, done.stderr
    assert "56 lines, 56 of them new or with another text since nothing was retrained here yet." in done.stdout
    command = "kedro run --env test --params training.epochs=1,training.start_from=models:/htr@champion"
    assert f"$ {command}" in done.stdout
    newest = mlflow_runs(project)[0]
    assert (newest.info.status, newest.data.tags["command"]) == ("FINISHED", command)
    num_runs = len(mlflow_runs(project))
    again = schedule(*small)
    assert (again.returncode, len(mlflow_runs(project))) == (0, num_runs)
    assert "56 lines, 0 of them new" in again.stdout
    assert "Nothing to do: retraining begins with 1." in again.stdout


# --- a cluster -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mlflow_server(tmp_path):
    """Address of a tracking server that keeps the artifacts too."""
    stores = ("--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "artifacts")
    with serving(tmp_path, "/health", ("server", *stores, "--workers", "1")) as address:
        yield address


def test_steps_of_kubeflow_share_one_run_on_a_tracking_server(project, mlflow_server, tmp_path):
    import mlflow

    (project / "mlflow.db").unlink()
    command = [sys.executable, "-m", "kedro", "kubeflow", "--image", "htr", "--tracking-uri", "http://mlflow:5000"]
    command += ["--output", "steps.yaml", "--env", "test", "--params", "report.title=Ours"]
    done = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pipeline, platforms = yaml.safe_load_all((project / "steps.yaml").read_text(encoding="utf-8"))
    on_cluster = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    given = pipeline["root"]["inputDefinitions"]["parameters"]["params"]["defaultValue"]
    for name in ("data-validation", "registration", "reporting"):  # what the others make is there already
        container = pipeline["deploymentSpec"]["executors"][f"exec-{name}"]["container"]
        words = [word.replace("{{$.inputs.parameters['params']}}", given) for word in container["args"]]
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        variables |= {entry["name"]: "3a6e-90b3" for entry in on_cluster[f"exec-{name}"]["fieldPathAsEnv"]}
        assert variables["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
        variables |= {"MLFLOW_TRACKING_URI": mlflow_server}
        variables |= {"HTR_GIT_COMMIT": "5" * 40}  # as the image has it
        step = subprocess.run(
            [sys.executable, "-m", *container["command"], *words],
            cwd=project,
            env=environment() | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert step.returncode == 0, step.stdout + step.stderr
    assert not (project / "mlflow.db").exists()
    store = mlflow.MlflowClient(mlflow_server, mlflow_server)
    (run,) = store.search_runs([store.get_experiment_by_name("htr_pipeline").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "kedro run")
    assert run.data.tags["pipelines"] == "data_validation, registration, reporting"
    assert run.data.tags["git_commit"] == "5" * 40
    champion = store.get_model_version_by_alias("htr", "champion")
    assert champion.run_id == run.info.run_id
    assert len([*tmp_path.glob("artifacts/**/model.keras")]) == 1
    logged = {entry.path for entry in store.list_artifacts(run.info.run_id)}
    assert {"report.html", "validation"} <= logged


# --- one batch -------------------------------------------------------------------------------------------------------


def test_check_batch_says_in_one_sentence_that_everything_fits_from_a_registered_network_too(project):
    (project / "mlflow.db").rename(project / "other.db")
    settings = {"tracking_uri": "sqlite:///other.db"}
    (project / "conf/local/mlflow.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-m", "kedro", "check-batch", "--env", "test", "--seconds", "120"]
    command += ["--params", "training.start_from=models:/htr@champion"]
    done = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Data, charset, lengths and loss fit together: 8 lines" in done.stdout
    (project / "conf/local/mlflow.yml").unlink()
    done = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "no model has been registered, for there is no " in done.stderr
    assert not (project / "mlflow.db").exists()


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_an_mlflow_that_refuses_is_a_sentence(project):
    store = client(project)
    store.delete_experiment(store.get_experiment_by_name("htr_pipeline").experiment_id)
    done = kedro_run(project, "--pipeline", "reporting")
    assert done.returncode == 1
    assert re.search(r"Error: MLflow at sqlite:.*deleted experiment 'htr_pipeline'", done.stderr)
    assert "Traceback" not in done.stdout + done.stderr


def test_source_that_does_not_exist_stops_with_a_sentence_and_a_failed_mlflow_run(project):
    done = kedro_run(project, "--params", "source.path=nowhere")
    assert done.returncode != 0
    assert "source.path = 'nowhere': there is no such file or folder" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert [run.info.status for run in mlflow_runs(project)] == ["FAILED", "FINISHED"]
