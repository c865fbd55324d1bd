"""When to retrain: what a look at real lines finds, and what happens to the process that retrains."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from htr_pipeline.cli import schedule
from htr_pipeline.core.config import UserError
from htr_pipeline.io.importers import SourceConfig, SourcesConfig
from htr_pipeline.io.importers.demo import DemoConfig
from htr_pipeline.orchestration.schedule import (
    begin,
    in_words,
    kedro_command,
    look,
    parse_interval,
    remember,
    seconds_to_next,
    start_of,
)
from htr_pipeline.pipelines.registration.nodes import RegistrationConfig
from tests.io.samples import RESOURCES


@pytest.fixture
def lines(tmp_path):
    return shutil.copytree(RESOURCES / "lines", tmp_path / "lines", ignore=shutil.ignore_patterns("invalid"))


def params_of(lines, **others):
    sources = SourcesConfig(**{name: {"path": str(path)} for name, path in others.items()})
    return {"source": SourceConfig(path=str(lines)), "sources": sources, "demo": DemoConfig()}


def test_lines_are_new_until_they_were_retrained_and_again_with_another_text(lines, tmp_path):
    state = tmp_path / "data/.retrained.json"
    first = look(params_of(lines), state)
    assert (len(first.lines), first.num_new, first.last) == (4, 4, "")
    assert look(params_of(lines), state).num_new == 4  # nothing was retrained, as after a run that failed
    remember(first, state)
    assert look(params_of(lines), state).num_new == 0
    (lines / "anna/p1_01.gt.txt").write_text("Ein anderes Wort", encoding="utf-8")
    shutil.copytree(lines / "bert", lines / "dora")
    shutil.copytree(lines / "bert", tmp_path / "more" / "w")
    (tmp_path / "more/w/p1_01.gt.txt").write_text("Noch eins", encoding="utf-8")
    assert look(params_of(lines), state).num_new == 1  # what lies there twice is no other line
    again = look(params_of(lines, first=lines, second=tmp_path / "more"), state)
    assert again.num_new == 2
    assert in_words(again).startswith("5 lines, 2 of them new or with another text since the last retraining (20")
    (lines / "anna/p1_01.gt.txt").unlink()
    assert look(params_of(lines), state).num_new == 0  # removed lines are no reason


def test_damaged_state_counts_as_none(lines, tmp_path, caplog):
    state = tmp_path / "state.json"
    for content in ("{", "[]", '{"lines": 3, "at": "", "unfinished": null}'):
        state.write_text(content)
        assert look(params_of(lines), state).num_new == 4
    assert caplog.text.count("all lines count as new") == 3


def test_source_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"sources\.letters: source\.path = .*there is no such file or folder"):
        look(params_of("unused", letters=tmp_path / "nowhere"), tmp_path / "state.json")


def test_command_has_what_was_asked_for_and_the_start():
    assert kedro_command("finetune", "") == ["run", "--env", "finetune"]
    command = kedro_command("test", "training.epochs=2", "models:/htr@champion")
    assert command[-2:] == ["--params", "training.epochs=2,training.start_from=models:/htr@champion"]


def test_what_has_not_ended_well_goes_on_from_where_it_began(lines, tmp_path):
    """Its own model may be the champion by now, and from that it would begin anew."""
    state, asked = tmp_path / "state.json", kedro_command("test", "")
    database = tmp_path / "mlflow.db"

    def start(found, asked=asked):
        return start_of(found, asked, f"sqlite:///{database}", RegistrationConfig())

    found = look(params_of(lines), state)
    assert start(found) is None
    assert not database.exists()  # MLflow would have made it
    begin(found, asked, "models:/htr@champion", state)
    again = look(params_of(lines), state)
    assert (again.num_new, start(again)) == (4, "models:/htr@champion")
    assert start(again, kedro_command("test", "training.epochs=2")) is None
    begin(again, asked, None, state)
    assert start(look(params_of(lines), state)) is None
    remember(again, state)
    assert look(params_of(lines), state).unfinished is None


def test_mlflow_that_does_not_answer_is_named_without_its_password(lines, tmp_path):
    found = look(params_of(lines), tmp_path / "state.json")
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9: ") as error:
        start_of(found, [], "http://bob:S3cret@127.0.0.1:9", RegistrationConfig())
    assert "S3cret" not in str(error.value)
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


@pytest.mark.parametrize("name", ["HTR_JOINT_RUN", "MLFLOW_RUN_ID"])
def test_retrainings_do_not_all_join_one_run(monkeypatch, name):
    monkeypatch.setattr("htr_pipeline.cli._look_and_retrain", sys.exit)
    done = CliRunner().invoke(schedule, ["--every", "12h"], env={name: "3a6e-90b3"})
    assert done.exit_code == 1
    assert f"{name} would put each retraining of --every into the same MLflow run: unset it." in done.output


def test_intervals():
    assert [parse_interval(text) for text in ("30m", "12h", " 7 D")] == [1800.0, 43200.0, 604800.0]
    assert parse_interval("10080m") == parse_interval("7d")
    for wrong in ("", "0h", "1w", "-3h", "1.5h", "12", "367d", "999999999d"):
        with pytest.raises(UserError, match="expected a number of minutes, hours or days, such as 30m, 12h or 7d, up"):
            parse_interval(wrong)
    assert seconds_to_next(100.0, 130.0, 60.0) == 30.0
    assert seconds_to_next(100.0, 300.0, 60.0) == 40.0  # the looks at 160, 220 and 280 are not made up for


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_ends_with_the_one_that_waits_for_it(tmp_path, sign):
    (tmp_path / "kedro.py").write_text("import time; open('began', 'w'); time.sleep(60)")  # in the place of Kedro
    waiting = "import os, sys; from htr_pipeline.orchestration.schedule import run_kedro; os.chdir(sys.argv[1]); "
    waiting += "sys.exit(run_kedro(['run']))"
    process = subprocess.Popen(
        [sys.executable, "-c", waiting, tmp_path], start_new_session=True, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "began").exists():
        assert process.poll() is None
        time.sleep(0.05)
    if sign == signal.SIGINT:  # as a terminal sends it: to both
        os.killpg(process.pid, sign)
    else:
        process.send_signal(sign)
    assert process.wait(30) == 128 + sign
