"""Kedro's command line for this project: errors of the user's are shown without a traceback."""

import copy
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import click
from kedro import KedroDeprecationWarning
from kedro.framework.cli.project import run as kedro_run
from kedro.validation.exceptions import ParameterValidationError

from htr_pipeline.core.config import UserError


@click.group(name="htr_pipeline")
def cli() -> None:
    """Commands of htr_pipeline."""


@functools.wraps(kedro_run.callback)
def _run(*args: Any, **options: Any) -> Any:
    # `--pipeline X` is what people type; Kedro's wish for `--pipelines` need not be shown every time.
    warnings.filterwarnings("ignore", category=KedroDeprecationWarning)
    try:
        return kedro_run.callback(*args, **options)
    except Exception as exc:
        for cause in _causes(exc):
            if isinstance(cause, UserError):
                raise click.ClickException(str(cause)) from exc
            if isinstance(cause, ParameterValidationError):
                raise click.ClickException(_settings_message(cause)) from exc
        raise


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__


def _settings_message(exc: ParameterValidationError) -> str:
    """Kedro's words without the names of classes."""
    lines = [line.rsplit("': ", 1)[-1] if "Failed to instantiate" in line else line for line in str(exc).splitlines()]
    return "\n".join(lines[1:] or lines)


run = copy.copy(kedro_run)
run.callback = _run
cli.add_command(run)
