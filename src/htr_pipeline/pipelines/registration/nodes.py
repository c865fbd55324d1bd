"""Nodes: model, charset, metrics → registration."""

import io
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from importlib.metadata import distributions, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

import htr_pipeline
from htr_pipeline.core.collapse import READING_CER
from htr_pipeline.core.config import UserError, config, setting
from htr_pipeline.core.image import ImageConfig, differing_settings, pixel_settings
from htr_pipeline.core.metrics import score_lines
from htr_pipeline.core.recipe import DecodingConfig
from htr_pipeline.io.features import FeatureShards, line_images
from htr_pipeline.io.manifest import SPLITS, image_roots
from htr_pipeline.io.starting_point import PROVENANCE, StartingPoint, num_learnt
from htr_pipeline.io.tracking import database_of, without_passwords

logger = logging.getLogger(__name__)

# Lines whose images are in memory at the same time.
_LINES_AT_A_TIME = 256
# Share of the test lines that a network may have learnt before its CER on them says nothing: of fewer it is better by
# no more than that share.
_MOST_LEARNT = 0.01
# What the model needs where it is loaded; everything else of the project's requirements is for training.
_REQUIREMENTS = ("keras", "numba", "numpy", "opencv-python-headless", "pandas", "pillow", "rapidfuzz")


@config("registration")
class RegistrationConfig:
    """Name and alias in the MLflow Model Registry."""

    model_name: str = setting(default="htr")
    alias: str = setting(default="champion")

    def __post_init__(self) -> None:
        # What MLflow itself would refuse, but after the training.
        if not re.fullmatch(r"[\w. -]*[\w-][\w. -]*", self.model_name):
            raise UserError(
                f"registration.model_name = {self.model_name!r}: expected a name of letters, digits, blanks and . _ -"
            )
        if not re.fullmatch(r"[\w-]{1,255}", self.alias) or re.fullmatch(r"v\d+|latest", self.alias, re.IGNORECASE):
            raise UserError(
                f"registration.alias = {self.alias!r}: expected letters, digits, _ and - only, and neither latest nor "
                "v and a number, which MLflow keeps for itself."
            )


def register_model(
    model: Any,
    charset: str,
    provenance: dict[str, Any],
    features: FeatureShards,
    manifest: pa.Table,
    metrics: dict[str, Any],
    language_model: Any,
    lexicon: str,
    calibration: dict[str, Any],
    image_config: ImageConfig,
    tuned_decoding: dict[str, Any],
    registration: RegistrationConfig,
) -> dict[str, Any]:
    """Model, charset, metrics → registration: a new version, and the alias moved to it if it reads better."""
    import mlflow

    from htr_pipeline import mlflow_model
    from htr_pipeline.core.model import weights_hash

    if weights_hash(model) != metrics["model_hash"]:
        raise UserError(
            "The metrics were measured with another network than the one to be registered, which was trained since. "
            "Measure this one first: kedro run --from-nodes read_lines"
        )
    if different := differing_settings(features.settings(), pixel_settings(image_config)):
        raise UserError(
            f"The lines on disk were made with other settings of features than this run has: {'; '.join(different)}. "
            "The model would read new lines in another way than it was measured. Give the settings of then, or begin "
            "with the lines: kedro run --from-nodes extract_features"
        )
    decoding = DecodingConfig(**tuned_decoding)
    headline = metrics["headline"]
    cer = metrics["splits"][headline["split"]][headline["decoder"]]["cer"]
    client = mlflow.MlflowClient()
    tags = {tag: metrics[tag] for tag in ("signature", "data_hash", "test_hash", "model_hash")}
    tags |= {"cer": repr(cer), "learnt_test_lines": str(metrics["learnt_lines"]["test"])}
    champion, number = find_champion(client, registration), _registered_by_this_run(client, registration, tags)
    is_own = champion is not None and str(champion.version) == number  # the run was killed behind that
    champion = None if is_own else champion
    learnt, num_lines = metrics["learnt_lines"]["test"], metrics["splits"]["test"][headline["decoder"]]["num_lines"]

    def judge(champion: Any) -> tuple[float | None, str | None, bool]:
        """The champion's CER, what forbids to compare it, and whether the new model is better."""
        if champion is None:
            return None, None, True
        champion_cer, problem = _champion_cer(champion, features, manifest, metrics)
        if learnt > _MOST_LEARNT * num_lines:
            problem = (
                f"{learnt} of the {num_lines} test lines were training lines of the network that this one started "
                f"from, so that its CER says nothing; version {champion.version} stays champion"
            )
        return champion_cer, problem, not problem and champion_cer is not None and cer < champion_cer

    champion_cer, problem, promoted = judge(champion)
    if number is None:
        texts = {
            "charset.json": charset,
            "lexicon.txt": lexicon,
            "settings.json": mlflow_model.settings_text(image_config, decoding, calibration),
            PROVENANCE: json.dumps(provenance),
        }
        logged = _log_model(model, language_model, texts, features, decoding)
        # With its tags at once: a version without them, of a run that was killed, could never be compared.
        number = str(mlflow.register_model(logged.model_uri, registration.model_name, tags=tags).version)
    run = client.get_run(mlflow.active_run().info.run_id)  # with the tags that it was given since it began
    while promoted and (now := find_champion(client, registration)) and str(now.version) != number:
        if champion and now.version == champion.version:
            break
        champion = now  # of another run, meanwhile
        champion_cer, problem, promoted = judge(champion)
    if promoted:
        client.set_registered_model_alias(registration.model_name, registration.alias, number)
    reason = problem or _reason(cer, champion_cer, champion, headline["split"])
    reason = "it became champion before this run was interrupted" if is_own else reason
    logger.log(
        logging.WARNING if problem else logging.INFO, "%s version %s: %s.", registration.model_name, number, reason
    )
    if problem:
        logger.warning(
            "If it is to be the champion all the same: mlflow.MlflowClient().set_registered_model_alias(%r, %r, %r)",
            registration.model_name, registration.alias, number,
        )  # fmt: skip
    if promoted and cer > READING_CER:
        logger.warning(
            "%s version %s hardly reads (CER %.0f %%), and is champion for want of a better one.",
            registration.model_name, number, 100 * cer,
        )  # fmt: skip
    return {
        "name": registration.model_name,
        "version": number,
        "model_uri": f"models:/{registration.model_name}/{number}",
        "alias": registration.alias,
        "promoted": promoted,
        "reason": reason,
        "champion_version": number if promoted else str(champion.version),
        "candidate_cer": cer,
        "champion_cer": champion_cer,
        "model_hash": metrics["model_hash"],
        "decoding": tuned_decoding,
        "run_id": run.info.run_id,
        "tracking_uri": _from_here(mlflow.get_tracking_uri()),
        **{tag: run.data.tags.get(tag, "unknown") for tag in ("git_commit", "git_changes", "command")},
    }


def _from_here(uri: str) -> str:
    """The address as it is shown, of a database within the project's folder from there."""
    database = database_of(uri)
    if database and database.is_relative_to(Path.cwd()):
        return f"sqlite:///{database.relative_to(Path.cwd())}"
    return without_passwords(uri)


def _registered_by_this_run(client: Any, registration: RegistrationConfig, tags: dict[str, str]) -> str | None:
    """The version that this MLflow run made of the same model before it was killed, or None."""
    import mlflow

    run_id = mlflow.active_run().info.run_id
    found = client.search_model_versions(f"name = '{registration.model_name}'")
    return next((str(v.version) for v in found if v.run_id == run_id and v.tags == tags), None)


def find_champion(client: Any, registration: RegistrationConfig) -> Any | None:
    """MLflow's version that has the alias; None where there is none yet.

    Raises:
        MlflowException: the registry does not answer, or refuses.
    """
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(registration.model_name)
    except MlflowException as exc:
        if exc.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise  # a server that does not answer knows a champion perhaps
        return None
    number = model.aliases.get(registration.alias)
    return client.get_model_version(registration.model_name, number) if number else None


def _champion_cer(
    champion: Any, features: FeatureShards, manifest: pa.Table, metrics: dict[str, Any]
) -> tuple[float | None, str | None]:
    """The champion's CER on the present test lines: as measured when it was registered, or else read anew.

    Returns:
        The CER, or None and why there is none.
    """
    from htr_pipeline.mlflow_model import LineReader

    split = metrics["headline"]["split"]
    most_learnt = _MOST_LEARNT * metrics["splits"][split][metrics["headline"]["decoder"]]["num_lines"]
    known = all(champion.tags.get(tag) == metrics[tag] for tag in ("test_hash", "signature"))
    if known and int(champion.tags.get("learnt_test_lines", "0")) <= most_learnt:
        return float(champion.tags["cer"]), None
    logger.info("The champion (version %s) was measured on other lines: it reads the present ones.", champion.version)
    lines = manifest.filter(pc.equal(manifest["split"], split))
    figures = features.figures()
    measured = figures.filter(pc.equal(figures["split"], split))
    columns = ["line_id", "text", "content_hash"]
    if sorted(lines.select(columns).to_pylist(), key=str) != sorted(measured.select(columns).to_pylist(), key=str):
        raise UserError(
            f"The {split} lines of the manifest are not those that the new model was measured on: the champion cannot "
            "be measured on them. Bring all up to date: kedro run --from-nodes extract_features"
        )

    def unable(exc: Exception) -> tuple[None, str]:  # the new model is worth keeping anyhow
        return (
            None,
            f"version {champion.version} stays champion, but could not read lines, from {champion.source} ({exc})",
        )

    try:
        # By the code of today, which knows what older records of settings mean: that of the champion's time, loaded
        # into this process, would find today's modules in place of its own.
        files = StartingPoint.find(f"models:/{champion.name}/{champion.version}", "The champion")
        reader = LineReader().load(files.files(), files.model())
        decoding = reader.decoding()
    except Exception as exc:  # files that are gone, libraries that do not fit
        return unable(exc)
    hashes = features.content_hashes()
    num = num_learnt(reader.provenance, hashes[split], hashes["train"])
    images = (grey for _, grey in line_images(lines.to_pylist(), image_roots(manifest)))
    texts: list[str | None] = []
    try:
        while num <= most_learnt and (some := list(islice(images, _LINES_AT_A_TIME))):
            texts += [text for text, _, _ in reader.read(some, decoding)]
    except UserError:  # an image that is gone is no fault of the champion
        raise
    except Exception as exc:
        return unable(exc)
    if num > most_learnt:
        return None, (
            f"version {champion.version} stays champion, but was trained on {num} of the {len(lines)} {split} lines, "
            "so that the two cannot be compared on them"
        )
    if unread := texts.count(None):
        logger.warning("The champion could not read %d of the lines, which count as empty.", unread)
    return score_lines(lines["text"].to_pylist(), [text or "" for text in texts]).cer, None


def _reason(cer: float, champion_cer: float | None, champion: Any | None, split: str) -> str:
    if champion is None or champion_cer is None:
        return "no version had this alias yet"
    verdict = "better than" if cer < champion_cer else "not better than"
    return f"CER {cer:.2%} on the {split} lines is {verdict} the {champion_cer:.2%} of version {champion.version}"


def _log_model(
    model: Any, language_model: Any, texts: Mapping[str, str], features: FeatureShards, decoding: DecodingConfig
) -> Any:
    """Writes network, language model and the text files of these names, and logs them as the run's model."""
    import mlflow

    from htr_pipeline import mlflow_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save(folder / "network.keras")
        language_model.save(folder / "language_model.npz")
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(mlflow_model.__file__)),
            artifacts={path.stem: str(path) for path in sorted(folder.iterdir())},
            code_paths=[str(Path(htr_pipeline.__file__).parent)],
            signature=mlflow_model.signature(decoding),
            input_example=pd.DataFrame({"image": [_example(features)]}),
            pip_requirements=[f"{name}=={version(name)}" for name in _requirements()],
        )


def _requirements() -> list[str]:
    installed = {distribution.name.replace("_", "-") for distribution in distributions()}
    return [*_REQUIREMENTS, "tensorflow-cpu" if "tensorflow-cpu" in installed else "tensorflow"]


def _example(features: FeatureShards) -> bytes:
    """PNG file of one line, dark ink on white."""
    line = next(line for split in SPLITS for line in features.lines(split))
    return _png(255 - line.pixels.T)


def _png(grey: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "PNG", compress_level=1)
    return stream.getvalue()
