import os
from pathlib import Path

import pytest

from htr_pipeline.core.config import UserError
from htr_pipeline.io.tracking import database_of, little_patience, mlflow_error, tracking_uri, without_passwords

SETTINGS = {"tracking_uri": "sqlite:///mlflow.db", "artifact_path": "mlartifacts", "experiment": "letters"}


def test_the_database_lies_in_the_project_and_the_environment_goes_first(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = tracking_uri(Path("/project"), SETTINGS)
    assert (uri, database_of(uri)) == ("sqlite:////project/mlflow.db", Path("/project/mlflow.db"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri(Path("/project"), SETTINGS) == "http://host:5000"
    assert database_of("http://host:5000") is None
    assert database_of("sqlite:///mlflow.db?timeout=30") == Path("mlflow.db")


@pytest.mark.parametrize("words", ["disk I/O error", "attempt to write a readonly database"])
def test_a_database_that_the_disk_refuses_is_not_said_to_be_damaged(words):
    error = OSError(f"(sqlite3.OperationalError) {words}\n[SQL: INSERT ...]")
    said = str(mlflow_error("sqlite:///mlflow.db", error))
    assert said == (
        f"MLflow's database mlflow.db cannot be read or written ((sqlite3.OperationalError) {words}). Look at the room "
        "on its disk, at your quota, at its permissions and at what else uses it."
    )
    assert "The address is that of" in str(mlflow_error("http://server", error))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trackin_uri": "x"}, "mlflow.yml: trackin_uri: there is no such setting. Allowed: tracking_uri"),
        ({"experiment": 2024}, "mlflow.yml: experiment = 2024: expected text; a number needs quotes"),
        ({"tracking_uri": None}, "mlflow.yml: tracking_uri = None: expected text"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        tracking_uri(Path("/project"), SETTINGS | change)


@pytest.mark.parametrize(
    ("given", "during"),
    [
        ({}, {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}),
        ({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5"}, {"MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}),
        ({"HTR_JOINT_RUN": "a"}, {}),
    ],
)
def test_patience_is_little_for_a_while_unless_the_environment_says_how_much(monkeypatch, given, during):
    for name in ("HTR_JOINT_RUN", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with little_patience():
        assert dict(os.environ) == before | during
    assert dict(os.environ) == before


def test_passwords_are_not_shown():
    assert without_passwords("http://bob:p@ss@host:5000/a@b") == "http://host:5000/a@b"
    assert (
        without_passwords("no answer from https://bob:secret@host, mail a@b") == "no answer from https://host, mail a@b"
    )
    assert without_passwords("sqlite:////a@b/mlflow.db") == "sqlite:////a@b/mlflow.db"
