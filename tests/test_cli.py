"""What the commands refuse, and half a database: in projects in which nothing was run yet."""

import contextlib
import os
import re
import signal
import sqlite3

import pytest
from click.testing import CliRunner

from htr_pipeline.cli import cli
from tests.project import kedro_run, kedro_transcribe, mlflow_runs, new_project, started_run, succeed


def test_killed_while_mlflow_makes_its_database_the_next_run_makes_it_anew(tmp_path):
    project = new_project(tmp_path / "project")

    def makes_database(_):
        return any(project.glob(".partial-*-mlflow.db"))

    with started_run(project, "--pipelines", "data_validation", until=makes_database) as process:
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (project / "mlflow.db").exists()
    succeed(project, "--pipelines", "data_validation")
    assert [run.info.status for run in mlflow_runs(project)] == ["FINISHED"]
    assert not list(project.glob(".partial-*"))


def test_half_a_database_of_mlflow_is_a_sentence(tmp_path):
    project = new_project(tmp_path / "project")
    with contextlib.closing(sqlite3.connect(project / "mlflow.db")) as database:
        database.execute("CREATE TABLE metrics (key)")
        database.commit()
    done = kedro_run(project, "--pipelines", "data_validation")
    assert done.returncode == 1
    assert re.search(
        r"Error: MLflow's database .*its tables are not as they should be .*move the file away", done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["run", "check-batch"])
def test_a_parameter_that_would_be_cut_at_a_comment_is_refused(command):
    done = CliRunner().invoke(cli, [command, "--params", "source.path=Scans #2,training.epochs=3"])
    assert done.exit_code == 2
    assert "what follows a blank and # counts as a comment, here '#2,training.epochs=3'" in done.output


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("training.epoch=3", "Did you mean training.epochs?"),
        ("training.epochs=0", "training.epochs = 0"),
        ("trainig.epochs=3", "Did you mean training?"),
        ("sources.iam.path=x,source.path=y", "source.path = 'y' would not be read, since there are `sources`: iam"),
        ("registration.alias=v3", "registration.alias = 'v3': expected letters"),
        ("registration.model_name=a/b", "registration.model_name = 'a/b': expected a name"),
        ("training.start_from=startr", "training.start_from = 'startr': Expected a folder with model.keras"),
        ("training=5", "training: expected settings, such as training.NAME=VALUE, got one value (int)."),
        ("checkpoint.path=conf", "checkpoint.path = 'conf': expected a file that can be written"),
        ("language_model.arpa=no.arpa", "language_model.arpa = 'no.arpa': there is no such file or folder"),
        ("sources.iam.path=x,sources.iam.formt=iam", "In sources.iam: source.formt = 'iam': there is no such setting"),
    ],
)
def test_wrong_parameter_stops_before_any_node_with_a_sentence(tmp_path, mistake, message):
    project = new_project(tmp_path / "project")
    done = kedro_run(project, "--params", mistake)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (project / "data").exists()
    assert not (project / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--pipeline", "train", "Did you mean one of these instead?\n    training"),
        ("--from-nodes", "train_netwrk", "Pipeline does not contain nodes named ['train_netwrk']"),
        ("--env", "fintune", "conf/fintune"),
    ],
)
def test_mistyped_names_are_named_without_a_traceback(tmp_path, option, value, message):
    done = kedro_run(new_project(tmp_path / "project"), option, value)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_new_lines_without_a_model_or_with_wrong_settings_are_a_sentence(tmp_path):
    project = new_project(tmp_path / "project")
    source = ["conf", "--output", str(tmp_path / "out")]
    for arguments, message in (
        (
            [],
            f"no model has been registered, for there is no {project / 'mlflow.db'}. `kedro run` trains and registers "
            "one; --model = starter takes",
        ),
        (["--model", "here"], "--model = 'here': Expected a folder with model.keras"),
        (["--model", "starter", "--looks", "1"], "no lines recognised"),
        (["--params", "training.epochs=3"], "--params training: only settings of source count here"),
        (["--params", "source.path=here"], "--params source.path=here: PATH is given already: conf. Leave one out."),
        (["--params", "source.id_colum=id"], "Did you mean source.id_column?"),
    ):
        done = kedro_transcribe(project, *source, *arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stdout + done.stderr
    assert not (project / "mlflow.db").exists()
