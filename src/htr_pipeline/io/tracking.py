"""Where MLflow is, by the environment or by mlflow.yml, and how that is shown."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from htr_pipeline.core.config import UserError

_SETTINGS = ("tracking_uri", "artifact_path", "experiment")
# In the environment of processes that are to write into one MLflow run: a name for it that is nobody else's.
JOINT_RUN = "HTR_JOINT_RUN"
# Of MLflow: how often it asks again, and how many seconds it waits for each answer.
_LITTLE_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}


def tracking_uri(project: Path, settings: Mapping[str, Any]) -> str:
    """The address of MLflow; a database's relative path is meant from the project.

    Args:
        project: its folder.
        settings: mlflow.yml.

    Raises:
        UserError: the settings have another name, or a value that is no text.
    """
    if unknown := settings.keys() - set(_SETTINGS):
        raise UserError(
            f"mlflow.yml: {', '.join(sorted(unknown))}: there is no such setting. Allowed: {', '.join(_SETTINGS)}."
        )
    for name in _SETTINGS:
        if not isinstance(settings.get(name), str):
            raise UserError(f"mlflow.yml: {name} = {settings.get(name)!r}: expected text; a number needs quotes.")
    uri: str = os.environ.get("MLFLOW_TRACKING_URI") or settings["tracking_uri"]
    local = uri.removeprefix("sqlite:///")
    return uri if local == uri or local.startswith("/") else f"sqlite:///{project / local}"


_OF_THE_DISK = ("disk I/O error", "readonly database", "disk is full", "unable to open", "database is locked")


def database_of(uri: str) -> Path | None:
    """The file of an embedded database; None for a server."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def is_of_the_disk(exc: Exception) -> bool:
    """Whether SQLite could not use its file, which is no fault of the tables in it."""
    return any(words in str(exc) for words in _OF_THE_DISK)


def without_passwords(text: str) -> str:
    """An address, or a text with addresses in it, without the user and password that they may hold."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


@contextmanager
def little_patience() -> Iterator[None]:
    """A server that refuses is an error after seconds, a silent one within a minute; the environment may say else.

    For the first question, whose answer somebody waits for. What writes results has all of MLflow's patience, and so
    has a step that a scheduler starts: its server may be starting too.
    """
    shortened = {} if os.environ.get(JOINT_RUN) else {k: v for k, v in _LITTLE_PATIENCE.items() if k not in os.environ}
    os.environ.update(shortened)
    try:
        yield
    finally:
        for name in shortened:
            os.environ.pop(name, None)


def mlflow_error(uri: str, exc: Exception) -> UserError:
    """What MLflow, or the way to it, said."""
    if (database := database_of(uri)) and is_of_the_disk(exc):
        return UserError(
            f"MLflow's database {database} cannot be read or written ({str(exc).splitlines()[0]}). Look at the room on "
            "its disk, at your quota, at its permissions and at what else uses it."
        )
    advice = "The address is that of MLFLOW_TRACKING_URI in the environment, or else of mlflow.yml in conf/."
    return UserError(without_passwords(f"MLflow at {uri}: {exc} {advice}"))
