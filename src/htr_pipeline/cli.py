"""Kedro's command line for this project: errors of the user's are shown without a traceback."""

import contextlib
import copy
import errno
import functools
import os
import re
import shlex
import time
import warnings
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click
from kedro import KedroDeprecationWarning
from kedro.config import MissingConfigException
from kedro.framework.cli.project import run as kedro_run
from kedro.framework.cli.utils import _split_params
from kedro.framework.context import KedroContext
from kedro.framework.project import pipelines
from kedro.validation.exceptions import ParameterValidationError

from htr_pipeline.core.config import UserError
from htr_pipeline.core.recipe import DECODERS
from htr_pipeline.io.tracking import JOINT_RUN, little_patience, tracking_uri, without_passwords

_RETRAINED = Path("data/.retrained.json")  # the lines of the last retraining by `kedro schedule`
_RETRAINING_ENV = "finetune"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_FORMATS = click.Choice(("page", "alto", "text", "tsv", "hocr"))  # io.exporters.FORMATS, which takes a while to import
# How Kedro's ValueErrors begin about a pipeline, nodes and tags that there are not.
_MISTYPED = ("Failed to find the pipeline", "Pipeline does not contain", "Pipeline contains no nodes")


@click.group(name="htr_pipeline")
def cli() -> None:
    """Commands of htr_pipeline."""


@functools.wraps(kedro_run.callback)
def _run(*args: Any, **options: Any) -> Any:
    # `--pipeline X` is what people type; Kedro's wish for `--pipelines` need not be shown every time.
    warnings.filterwarnings("ignore", category=KedroDeprecationWarning)
    with errors_in_words():
        return kedro_run.callback(*args, **options)


@contextlib.contextmanager
def errors_in_words() -> Iterator[None]:
    """Shows errors that a user can do something about without a traceback."""
    try:
        yield
    except Exception as exc:
        for cause in _causes(exc):
            if isinstance(cause, UserError):
                raise click.ClickException(str(cause)) from exc
            if isinstance(cause, ParameterValidationError):
                raise click.ClickException(_settings_message(cause)) from exc
            is_full = isinstance(cause, OSError) and (cause.errno in _FULL or "No space left" in str(cause))
            if is_full or "database or disk is full" in str(cause):  # SQLite's words
                raise click.ClickException(
                    f"There is no room left to write to ({cause}). Make room: the same command goes on with what was "
                    "finished."
                ) from exc
            if isinstance(cause, OSError) and cause.errno in _FORBIDDEN:
                raise click.ClickException(
                    f"{cause.filename}: {cause.strerror}. Give yourself the right to read and write there, or work in "
                    "a copy of the project."
                ) from exc
            if type(cause).__name__ == "MlflowException":  # which is not imported for every command
                raise click.ClickException(
                    f"MLflow: {without_passwords(str(cause))}\nThe same command goes on with what was finished."
                ) from exc
            if isinstance(cause, MissingConfigException) or str(cause).startswith(_MISTYPED):
                raise click.ClickException(str(cause)) from exc
        raise


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__


def _settings_message(exc: ParameterValidationError) -> str:
    """Kedro's words without the names of classes."""
    words = re.sub(r".*Failed to instantiate \w+ for parameter '[^']*': ", "", str(exc))
    words = re.sub(
        r".*Parameter '(\w+)': Expected dict for dataclass \w+, got (\w+)",
        r"\1: expected settings, such as \1.NAME=VALUE, got one value (\2).",
        words,
    )
    lines = words.splitlines()
    return "\n".join(lines[1:] or lines)


def _settings(ctx: click.Context, param: click.Parameter, value: str) -> dict[str, Any]:
    """Kedro's reading of --params, which would end at what YAML takes for a comment without a word."""
    if cut := re.search(r"\s#.*", value):
        raise click.BadParameter(
            f"what follows a blank and # counts as a comment, here {cut[0].strip()!r}. Write this setting into "
            "conf/local/parameters.yml, in quotation marks.",
            ctx,
            param,
        )
    return _split_params(ctx, param, value)


def _params_and_text(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, dict[str, Any]]:
    """The settings, beside the text for the processes that are to have them."""
    return value, _settings(ctx, param, value)


run = copy.deepcopy(kedro_run)
run.callback = _run
next(option for option in run.params if option.name == "params").callback = _settings
cli.add_command(run)


@cli.command("export")
@click.option("--format", required=True, type=_FORMATS, help="What to write.")
@click.option("--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder to write to.")
@click.option(
    "--decoder", help="Which decoder's readings: greedy, beam or beam_lm (default: decoding.decoder of the run)."
)
@click.option("--split", type=click.Choice(("validation", "test")), help="Only its lines; default: all read.")
@click.option("--env", "-e", help="Kedro environment, as for run.")
def export(format: str, output: Path, decoder: str | None, split: str | None, env: str | None) -> None:
    """Write what was read: into copies of the PAGE or ALTO files, or as text, TSV or hOCR."""
    from htr_pipeline.io.exporters import export_lines

    with errors_in_words():
        context = _load_context(env)
        catalog, output = context.catalog, output.resolve()
        os.chdir(context.project_path)  # which paths of sources mean
        tables = catalog.load("manifest"), catalog.load("predictions")
        decoder = decoder or catalog.load("metrics")["headline"]["decoder"]
        files = export_lines(format, *tables, output, decoder=decoder, split=split)
        click.echo(f"Files in {output}: {len(files)}, for instance {files[0]}")


@cli.command("transcribe")
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder to write to.")
@click.option(
    "--format",
    type=_FORMATS,
    help="What to write; default: as the source has it, page or alto, tsv for anything else.",
)
@click.option("--model", help="models:/NAME@ALIAS, models:/NAME/VERSION, a folder or starter; default: the champion.")
@click.option("--decoder", type=click.Choice(DECODERS), help="Default: that of the model.")
@click.option("--looks", type=click.Choice(("1", "3")), help="At a line: 1 is faster; default: those of the model.")
@click.option("--only-empty", is_flag=True, help="Leave lines alone that have a text already.")
@click.option("--env", "-e", help="Kedro environment, as for run.")
@click.option("--params", default="", help="Settings of the source, as source.image_column=file.", callback=_settings)
def transcribe(
    path: Path,
    output: Path,
    format: str | None,
    model: str | None,
    decoder: str | None,
    looks: str | None,
    only_empty: bool,
    env: str | None,
    params: dict[str, Any],
) -> None:
    """Read new lines.

    PATH is a folder of PAGE or ALTO files with their page images, or of line images; one such file; or a table of line
    images.
    """
    from htr_pipeline.io.importers import NewLinesConfig
    from htr_pipeline.io.starting_point import STARTER, StartingPoint
    from htr_pipeline.transcription import REJECTED, transcribe

    with errors_in_words():
        settings = params.pop("source", {})
        if params or not isinstance(settings, dict):
            wrong = ", ".join(params) or f"source={settings}"
            raise UserError(f"--params {wrong}: only settings of source count here, as source.id_column=id.")
        if "path" in settings:
            raise UserError(f"--params source.path={settings['path']}: PATH is given already: {path}. Leave one out.")
        source, output = NewLinesConfig(**{"path": str(path.absolute()), **settings}), output.absolute()
        context = _load_context(env)
        registration = context.params["registration"]
        if model is None:
            model = f"models:/{registration.model_name}@{registration.alias}"
        if model.startswith("models:"):
            _use_mlflow(context)
        elif model != STARTER and Path(model).is_dir():
            model = str(Path(model).absolute())
        with little_patience():
            start = StartingPoint.find(model, "--model")
        os.chdir(context.project_path)  # where the store is, and images that lay within a table
        done = transcribe(
            source,
            output,
            start,
            Path("data/07_model_output/transcriptions.sqlite"),
            format=format,
            decoder=decoder,
            looks=int(looks) if looks else None,
            only_empty=only_empty,
        )
    before = f", {done.num_known} of them before" if done.num_known else ""
    right = "" if done.num_right is None else f" About {done.num_right:.0f} of them should be without an error."
    click.echo(f"Lines read by {start.name} ({done.decoder}): {done.num_lines}{before}.{right}")
    if done.num_empty:
        click.echo(f"On {done.num_empty} of them nothing was found: they are empty, or not lines of writing.")
    if done.num_kept:
        click.echo(f"Lines that have a text, left as they are: {done.num_kept}.")
    click.echo(f"Files in {output}: {len(done.files)}, for instance {done.files[0]}")
    if done.num_rejected:
        click.echo(f"Lines that could not be read: {done.num_rejected}; {output / REJECTED} says why.")


@cli.command("schedule")
@click.option("--every", help="How often to look, as 30m, 12h or 7d; default: once, for cron and the like.")
@click.option(
    "--min-new-lines", default=1, show_default=True, type=click.IntRange(1), help="With fewer, nothing is retrained."
)
@click.option("--env", "-e", default=_RETRAINING_ENV, show_default=True, help="Kedro environment of the runs.")
@click.option("--params", default="", help="Settings of the runs, as for run.", callback=_params_and_text)
def schedule(every: str | None, min_new_lines: int, env: str, params: tuple[str, dict[str, Any]]) -> None:
    """Look for new transcriptions and, where there are any, run everything again from the champion.

    The new model becomes the champion only if it reads the same test lines better.
    """
    from htr_pipeline.orchestration.schedule import parse_interval, seconds_to_next

    with errors_in_words():
        interval = parse_interval(every) if every else None
        for name in (JOINT_RUN, "MLFLOW_RUN_ID"):
            if every and os.environ.get(name):
                raise UserError(f"{name} would put each retraining of --every into the same MLflow run: unset it.")
    while True:
        started = time.monotonic()
        try:
            with errors_in_words():
                code = _look_and_retrain(min_new_lines, env, *params)
        except click.ClickException as exc:
            if interval is None:
                raise
            exc.show()
            code = exc.exit_code
        if interval is None:
            raise SystemExit(code)
        wait = seconds_to_next(started, time.monotonic(), interval)
        click.echo(f"Next look at {datetime.now() + timedelta(seconds=wait):%Y-%m-%d %H:%M}. Ctrl-C ends this.")
        time.sleep(wait)


def _look_and_retrain(min_new_lines: int, env: str, params: str, settings: dict[str, Any]) -> int:
    """Exit code of the run; 0 where none was needed."""
    from htr_pipeline.orchestration import schedule as retraining

    context = _load_context(env, settings)
    os.chdir(context.project_path)
    found = retraining.look(context.params, _RETRAINED)
    click.echo(retraining.in_words(found))
    if found.num_new < min_new_lines:
        click.echo(f"Nothing to do: retraining begins with {min_new_lines}.")
        return 0
    asked = retraining.kedro_command(env, params)
    start = None
    if "start_from" not in settings.get("training", {}):
        start = retraining.start_of(found, asked, _use_mlflow(context), context.params["registration"])
    command = retraining.kedro_command(env, params, start)
    click.echo(f"$ {shlex.join(['kedro', *command])}")
    retraining.begin(found, asked, start, _RETRAINED)
    if code := retraining.run_kedro(command):
        click.echo(f"The run ended with exit code {code}; the same lines count as new at the next look.", err=True)
    else:
        retraining.remember(found, _RETRAINED)
    return code


@cli.command("kubeflow")
@click.option("--image", required=True, help="Container image of the project, as `make image` builds it.")
@click.option(
    "--output",
    default="kubeflow.yaml",
    show_default=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write.",
)
@click.option(
    "--tracking-uri", "address", help="Address of the MLflow server; default: that of mlflow.yml or of the environment."
)
@click.option(
    "--claim",
    default="htr-data",
    show_default=True,
    help="PersistentVolumeClaim that is mounted as data/ of every step.",
)
@click.option(
    "--secret",
    "secrets",
    multiple=True,
    help="SECRET:KEY, which becomes the environment variable KEY; may be repeated.",
)
@click.option("--cpus", help="Request of each step, as 4 or 500m.")
@click.option("--memory", help="Request and limit of each step, as 8Gi.")
@click.option("--gpus", default=0, show_default=True, type=click.IntRange(0, 1000), help="For the step of training.")
@click.option(
    "--retries", default=2, show_default=True, type=click.IntRange(0, 1000), help="Of a step that fails or is killed."
)
@click.option("--retrain", is_flag=True, help="One step that runs `kedro schedule`, for recurring runs.")
@click.option("--env", "-e", help="Kedro environment of the steps.")
@click.option(
    "--params",
    default="",
    help="Settings of runs that are started without any, as for run.",
    callback=_params_and_text,
)
def kubeflow(
    image: str,
    output: Path,
    address: str | None,
    claim: str,
    secrets: tuple[str, ...],
    cpus: str | None,
    memory: str | None,
    gpus: int,
    retries: int,
    retrain: bool,
    env: str | None,
    params: tuple[str, dict[str, Any]],
) -> None:
    """Write the pipelines as a pipeline of Kubeflow, a step each. docs/deployment.md shows the rest."""
    from htr_pipeline.orchestration.kubeflow import Steps, run_commands, schedule_commands, write_pipeline

    names = [name for name in pipelines if name != "__default__"]
    env = env or (_RETRAINING_ENV if retrain else None)
    commands = schedule_commands(env) if retrain else run_commands(names, env)
    output = output.absolute()
    text, settings = params
    with errors_in_words():
        context = _load_context(env, settings)
        steps = Steps(
            image=image,
            tracking_uri=address or tracking_uri(context.project_path, context.config_loader["mlflow"]),
            claim=claim,
            secrets=[(name, key) for name, _, key in (secret.partition(":") for secret in secrets)],
            cpus=cpus,
            memory=memory,
            gpus=gpus,
            retries=retries,
        )
        try:
            write_pipeline(output, commands, steps, text)
        except OSError as exc:
            raise UserError(f"--output {output}: the file cannot be written ({exc.strerror}).") from exc
    click.echo(f"Steps in {output}: {', '.join(commands)}.")
    if retrain:
        submit = "recurring-run create --enabled --job-name htr --cron-expression '0 0 3 * * *' --pipeline-package-path"
        click.echo("At three every night (six fields, seconds first):")
    else:
        submit = "run create --package-file"
        click.echo("A run:")
    click.echo(
        f"  kfp --endpoint ADDRESS {submit} {shlex.quote(str(output))} --experiment-name htr params=source.path=..."
    )


def _load_context(env: str | None, params: dict[str, Any] | None = None) -> KedroContext:
    from kedro.framework.session import KedroSession

    with KedroSession.create(env=env, runtime_params=params) as session:
        return session.load_context()


def _use_mlflow(context: KedroContext) -> str:
    """Sets the project's MLflow, from which a model is to be loaded; returns where that is."""
    import mlflow

    uri = tracking_uri(context.project_path, context.config_loader["mlflow"])
    mlflow.set_tracking_uri(uri)
    return uri


@cli.command("check-batch")
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(1.0, 1e6), help="When to give up.")
@click.option("--env", "-e", help="Kedro environment, as for run.")
@click.option("--params", default="", help="Settings, as for run.", callback=_settings)
def check_batch(seconds: float, env: str | None, params: dict[str, Any]) -> None:
    """Learn one batch by heart: do data, charset, lengths and loss fit together? Exit code 1 if not."""
    from htr_pipeline.pipelines.training.nodes import check_training_batch

    with errors_in_words():
        context = _load_context(env, params)
        settings, catalog = context.params, context.catalog
        os.chdir(context.project_path)  # which paths among the settings mean
        if str(settings["training"].start_from).startswith("models:"):
            _use_mlflow(context)
        with little_patience():
            passed, sentence = check_training_batch(
                catalog.load("features"),
                catalog.load("feature_stats"),
                settings["model"],
                settings["training"],
                settings["checkpoint"],
                seconds,
            )
    if not passed:
        raise click.ClickException(sentence)
    click.echo(sentence)
