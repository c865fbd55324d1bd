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
from htr_pipeline.pipelines.registration.nodes import RegistrationConfig, find_champion

logger = logging.getLogger(__name__)

_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0}
_HASH_DIGITS = 16  # enough to tell millions of lines apart


@dataclass(frozen=True)
class Look:
    """What a look at the sources found.

    Attributes:
        lines: hash of image and text of every line.
        num_new: lines that the last retraining did not have, or had with another text.
        last: when that was; empty if there was none.
    """

    lines: frozenset[str]
    num_new: int
    last: str


def parse_interval(text: str) -> float:
    """Seconds of "30m", "12h" or "7d".

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"(\d{1,6})\s*([mhd])", text.strip().lower())
    if not match or int(match[1]) == 0:
        raise UserError(f"--every {text}: expected a number of minutes, hours or days, such as 30m, 12h or 7d.")
    return int(match[1]) * _UNITS[match[2]]


def look(params: Mapping[str, Any], state: Path) -> Look:
    """Reads all lines of the sources and compares them with those of the last retraining.

    Args:
        params: Kedro's, of which source, sources and demo count.
        state: file that remember wrote.

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
    known, last = _remembered(state)
    return Look(frozenset(lines), len(lines - known), last)


def remember(found: Look, state: Path) -> None:
    """Keeps the lines of a retraining that ended well."""
    content = {"at": datetime.now().astimezone().isoformat(" ", "minutes"), "lines": sorted(found.lines)}
    with replacing(state) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")


def _remembered(state: Path) -> tuple[set[str], str]:
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        return set(map(str, content["lines"])), str(content["at"])
    except FileNotFoundError:
        return set(), ""
    except (OSError, ValueError, KeyError, TypeError) as exc:
        logger.warning("%s: cannot be read (%r); all lines count as new.", state, exc)
        return set(), ""


def champion_uri(registration: RegistrationConfig) -> str | None:
    """The champion as training.start_from takes it, in the MLflow that is set; None where there is none yet.

    Raises:
        UserError: MLflow does not answer.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        champion = find_champion(mlflow.MlflowClient(), registration)
    except MlflowException as exc:
        raise UserError(f"MLflow at {mlflow.get_tracking_uri()}: {exc}") from exc
    return f"models:/{registration.model_name}@{registration.alias}" if champion else None


def run_command(command: Sequence[str]) -> int:
    """Runs it to its end, also when asked to stop meanwhile, which is passed on; its exit code, or 128 and the signal.

    Ctrl-C reaches both processes: a training ends after its batch then, and the same command goes on with it.
    """
    process = subprocess.Popen(command)
    asked = 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = number
        if number == signal.SIGTERM:
            process.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + asked if asked else code


def kedro_command(env: str, params: str, start_from: str | None) -> list[str]:
    """The run that retrains."""
    given = [params] if params else []
    if start_from:
        given.append(f"training.start_from={start_from}")
    command = [sys.executable, "-m", "kedro", "run", "--env", env]
    return [*command, "--params", ",".join(given)] if given else command


def seconds_to_next(started: float, now: float, interval: float) -> float:
    """How long to wait until the next look: looks that a long run has missed are not made up for."""
    return interval - (now - started) % interval


def in_words(found: Look) -> str:
    """One sentence."""
    since = f"since the last retraining ({found.last})" if found.last else "since nothing was retrained here yet"
    return f"{len(found.lines)} lines, {found.num_new} of them new or with another text {since}."
