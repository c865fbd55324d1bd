import pytest
from kedro.config import MissingConfigException

from htr_pipeline.config_loader import LayeredConfigLoader
from htr_pipeline.core.config import UserError
from htr_pipeline.settings import CONFIG_LOADER_ARGS


@pytest.fixture
def conf(tmp_path):
    written = {
        "base/parameters_a.yml": "source: {path: demo, format: auto}\ntraining: {epochs: 10, seed: 1, rate: 6}",
        "local/parameters.yml": "source: {path: letters}\ntraining: {epochs: 60, seed: 7}",
        "finetune/parameters.yml": "training: {epochs: 30, rate: 2}",
        "base/mlflow.yml": "tracking_uri: sqlite:///mlflow.db",
        "local/mlflow.yml": "tracking_uri: http://server",
        "base/catalog.yml": "model: {type: json.JSONDataset, filepath: base.json}",
        "finetune/catalog.yml": "model: {type: json.JSONDataset, filepath: finetune.json}",
    }
    for name, content in written.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return tmp_path


def load(conf, env, key="parameters", **runtime_params):
    return LayeredConfigLoader(str(conf), env, runtime_params, **CONFIG_LOADER_ARGS)[key]


def test_settings_of_the_machine_stay_in_force_with_an_environment(conf):
    source = {"path": "letters", "format": "auto"}
    assert load(conf, None) == {"source": source, "training": {"epochs": 60, "seed": 7, "rate": 6}}
    assert load(conf, "finetune") == {"source": source, "training": {"epochs": 30, "seed": 7, "rate": 2}}
    given = load(conf, "finetune", training={"epochs": 3})
    assert given == {"source": source, "training": {"epochs": 3, "seed": 7, "rate": 2}}


@pytest.mark.parametrize("env", [None, "finetune"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"source:\n\tpath: x\n", r"cannot be read as YAML: .*line 2"),
        (b"source: path: x\n", "cannot be read as YAML: mapping values are not allowed"),
        (b"source: {path: x}\nsource: {path: y}\n", "cannot be read as YAML: .*found duplicate key source"),
        (b"\xff\xfe\n", "cannot be read as YAML: .*codec can't decode"),
        (b"- a\n", "expected settings, a NAME: VALUE on each line, got a list"),
    ],
)
def test_a_file_that_is_no_yaml_is_named(conf, env, content, message):
    (conf / "local/parameters.yml").write_bytes(content)
    with pytest.raises(UserError, match=rf"(?s)local/parameters\.yml: {message}"):
        load(conf, env)


def test_what_an_environment_does_not_speak_of_is_the_machines(conf):
    assert load(conf, "finetune", "mlflow") == {"tracking_uri": "http://server"}
    assert load(conf, "finetune", "catalog")["model"]["filepath"] == "finetune.json"
    assert load(conf, None, "catalog")["model"]["filepath"] == "base.json"


def test_a_packaged_project_has_no_settings_of_a_machine(conf):
    for file in (conf / "local").iterdir():
        file.unlink()
    (conf / "local").rmdir()
    assert load(conf, "finetune")["training"] == {"epochs": 30, "seed": 1, "rate": 2}


def test_credentials_of_the_machine_and_global_values_are_known_with_an_environment(conf):
    (conf / "local/credentials.yml").write_text("store: {key: secret}", encoding="utf-8")
    (conf / "base/globals.yml").write_text("root: data\nname: base", encoding="utf-8")
    (conf / "local/globals.yml").write_text("name: mine", encoding="utf-8")
    (conf / "finetune/parameters.yml").write_text(
        "report: {title: '${globals:root} ${globals:name}'}", encoding="utf-8"
    )
    assert load(conf, "finetune", "credentials") == {"store": {"key": "secret"}}
    assert load(conf, "finetune")["report"] == {"title": "data mine"}


def test_an_environment_that_there_is_not_is_an_error(conf):
    with pytest.raises(MissingConfigException, match="finetunes"):
        load(conf, "finetunes")
