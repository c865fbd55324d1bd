"""Retraining as new transcriptions arrive: what `kedro schedule` does."""

import hashlib
import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from htr_pipeline.core.config import UserError
from htr_pipeline.io.atomic import replacing
from htr_pipeline.io.importers import import_lines
from htr_pipeline.io.tracking import database_of, little_patience, mlflow_error
from htr_pipeline.pipelines.registration.nodes import RegistrationConfig, find_champion

logger = logging.getLogger(__name__)

_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST_INTERVAL = 366 * _UNITS["d"]
_HASH_DIGITS = 16  # enough to tell millions of lines apart


@dataclass(frozen=True)
class Look:
    """What a look at the sources found.

    Attributes:
        lines: hash of image and text of every line.
        known: those of the last retraining that ended well.
        last: when that was; empty if there was none.
        unfinished: of asked and start_from, with which a retraining has begun that has not ended well; else None.
    """

    lines: frozenset[str]
    known: frozenset[str]
    last: str
    unfinished: dict[str, str | None] | None

    @property
    def num_new(self) -> int:
        """Lines that the last retraining did not have, or had with another text."""
        return len(self.lines - self.known)


def parse_interval(text: str) -> float:
    """Seconds of "30m", "12h" or "7d".

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"(\d{1,9})\s*([mhd])", text.strip().lower())
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0 < seconds <= _LONGEST_INTERVAL:
        raise UserError(
            f"--every {text}: expected a number of minutes, hours or days, such as 30m, 12h or 7d, up to a year."
        )
    return seconds


def look(params: Mapping[str, Any], state: Path) -> Look:
    """Reads all lines of the sources and compares them with those of the last retraining.

    Args:
        params: Kedro's, of which source, sources and demo count.
        state: file that begin and remember write.

    Raises:
        UserError: a source cannot be read.
    """
    lines = set()
    for name, source in params["sources"].resolve(params["source"]).items():
        try:
            found, _ = import_lines(source.path, source.format, source, params["demo"])
        except UserError as exc:
            raise UserError(f"sources.{name}: {exc}" if name else str(exc)) from exc
        for content_hash, text in zip(found["content_hash"].to_pylist(), found["text"].to_pylist(), strict=True):
            lines.add(hashlib.sha256(f"{content_hash} {text}".encode()).hexdigest()[:_HASH_DIGITS])
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        return Look(frozenset(lines), frozenset(content["lines"]), str(content["at"]), content["unfinished"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as exc:
        logger.warning("%s: cannot be read (%r); all lines count as new.", state, exc)
    return Look(frozenset(lines), frozenset(), "", None)


def begin(found: Look, asked: Sequence[str], start_from: str | None, state: Path) -> None:
    """Keeps with what a retraining begins, so that the next look goes on with it if it does not end well."""
    _write(state, found.known, found.last, {"asked": " ".join(asked), "start_from": start_from})


def remember(found: Look, state: Path) -> None:
    """Keeps the lines of a retraining that ended well."""
    _write(state, found.lines, datetime.now().astimezone().isoformat(" ", "minutes"), None)


def _write(state: Path, lines: frozenset[str], at: str, unfinished: dict[str, str | None] | None) -> None:
    with replacing(state) as partial:
        content = {"at": at, "unfinished": unfinished, "lines": sorted(lines)}
        partial.write_text(json.dumps(content), encoding="utf-8")


def start_of(found: Look, asked: Sequence[str], uri: str, registration: RegistrationConfig) -> str | None:
    """What the retraining is to start from: what the one that has not ended well did, or else the champion.

    Args:
        found: by look.
        asked: the command without a start.
        uri: of MLflow.
        registration: name and alias.

    Returns:
        As training.start_from takes it; None where there is no champion yet.

    Raises:
        UserError: MLflow does not answer.
    """
    if found.unfinished and found.unfinished["asked"] == " ".join(asked):
        return found.unfinished["start_from"]
    if (database := database_of(uri)) and not database.exists():  # MLflow would make one
        return None
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        with little_patience():
            champion = find_champion(mlflow.MlflowClient(uri, uri), registration)
    except (MlflowException, OSError) as exc:
        raise mlflow_error(uri, exc) from exc
    return f"models:/{registration.model_name}@{registration.alias}" if champion else None


def kedro_command(env: str, params: str, start_from: str | None = None) -> list[str]:
    """The run that retrains, as `kedro` takes it."""
    given = [params] if params else []
    if start_from:
        given.append(f"training.start_from={start_from}")
    return ["run", "--env", env, *(["--params", ",".join(given)] if given else [])]


def run_kedro(arguments: Sequence[str]) -> int:
    """Runs Kedro to its end, also when asked to stop meanwhile, which is passed on.

    Ctrl-C reaches both processes: a training ends after its batch then, and the same command goes on with it.

    Returns:
        Its exit code; 128 and the signal that has ended it.

    Raises:
        SystemExit: when it has ended, if this process was asked to stop.
    """
    process: subprocess.Popen | None = None
    asked = 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = number
        if number == signal.SIGTERM and process:
            process.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen([sys.executable, "-m", "kedro", *arguments])
        if asked:  # before there was a process to pass it on to
            process.send_signal(asked)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise SystemExit(128 + asked)
    return 128 - code if code < 0 else code


def seconds_to_next(started: float, now: float, interval: float) -> float:
    """How long to wait until the next look: looks that a long run has missed are not made up for."""
    return interval - (now - started) % interval


def in_words(found: Look) -> str:
    """One sentence."""
    since = f"since the last retraining ({found.last})" if found.last else "since nothing was retrained here yet"
    return f"{len(found.lines)} lines, {found.num_new} of them new or with another text {since}."
