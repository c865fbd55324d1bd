"""The trained network that fine-tuning starts from: in a folder, in the MLflow Model Registry, or in this package."""

import contextlib
import functools
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import htr_pipeline
from htr_pipeline.core.config import UserError
from htr_pipeline.core.text import Charset
from htr_pipeline.io.checkpoints import DAMAGED_ARCHIVE
from htr_pipeline.io.datasets import read_network
from htr_pipeline.io.tracking import database_of, without_passwords

# The model that the package brings along, under this name; a folder of that name is ./starter.
STARTER = "starter"
STARTER_FOLDER = Path(htr_pipeline.__file__).parent / "starter"
PROVENANCE = "provenance.json"
# Of the hash of a line: enough to tell millions apart.
_HASH_DIGITS = 16


@dataclass(frozen=True)
class StartingPoint:
    """Two files, and beside them perhaps what says how the lines were made that the network was trained on.

    Attributes:
        name: where they were found: as given, but for an alias of the registry or `latest`, in whose place is the
            version.
        model_path: a .keras file.
        charset_path: its charset.json.
    """

    name: str
    model_path: Path
    charset_path: Path

    @classmethod
    def find(cls, place: str, setting: str = "training.start_from") -> "StartingPoint":
        """Finds the files.

        Args:
            place: a folder with charset.json and model.keras, as training writes them, a models:/ URI of MLflow, or
                "starter".
            setting: what the place was given as, for errors.

        Raises:
            UserError: they are not there.
        """
        name, folder = place, Path(place)
        if place == STARTER:
            folder = STARTER_FOLDER
        elif place.startswith("models:"):
            name, folder = _registered(place, setting)
        models = [folder / file for file in ("model.keras", "network.keras") if (folder / file).is_file()]
        charset = folder / "charset.json"
        if not models or not charset.is_file():
            missing = f" This installation has no starter model in {folder}." if place == STARTER else ""
            raise UserError(
                f"{setting} = {place!r}:{missing} Expected a folder with model.keras and charset.json, as "
                "training writes them to data/06_models, the URI of a registered model, such as models:/htr@champion, "
                "or starter, the model that the package brings along."
            )
        return cls(name, models[0], charset)

    def files(self) -> dict[str, Path]:
        """What mlflow_model.LineReader reads with: the whole of a registered model, or else network and charset.

        Raises:
            UserError: only a part of a registered model is there.
        """
        folder = self.model_path.parent
        names = ("settings.json", "language_model.npz", "lexicon.txt") if (folder / "settings.json").exists() else ()
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(f"{folder} has settings.json, but not {' and '.join(missing)}: copy the whole model.")
        if self.provenance():
            names = (*names, PROVENANCE)
        return {
            "network": self.model_path,
            "charset": self.charset_path,
            **{Path(name).stem: folder / name for name in names},
        }

    def model(self) -> Any:
        """The network.

        Raises:
            UserError: it cannot be read, it has other classes than its charset, or the provenance beside it is of
                another network.
        """
        try:
            model = read_network(self.model_path)
        except DAMAGED_ARCHIVE as exc:
            raise UserError(f"{self.model_path}: no network can be read from it ({exc}). Copy it again.") from exc
        classes, expected = model.outputs[0].shape[-1], self.charset().num_classes
        if classes != expected:
            raise UserError(
                f"{self.model_path} has {classes} classes, and {self.charset_path} makes {expected}: "
                "these two files do not belong together."
            )
        from htr_pipeline.core.model import weights_hash

        if self.provenance().get("model_hash", found := weights_hash(model)) != found:
            raise UserError(
                f"{self.model_path.parent / PROVENANCE} is of another network than {self.model_path.name} beside it. "
                "Copy the one that lies beside that network, or remove it."
            )
        return model

    def charset(self) -> Charset:
        """Its characters."""
        try:
            return Charset.from_json(self.charset_path.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError) as exc:
            raise UserError(f"{self.charset_path}: this is no charset: {exc!r}.") from None

    def provenance(self) -> dict[str, Any]:
        """What make_provenance wrote beside the network; empty where nothing lies there or something else does."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.model_path.parent / PROVENANCE).read_text(encoding="utf-8"))
            kinds = {"model_hash": str, "charset_hash": str, "feature_settings": dict, "learnt_lines": list}
            if isinstance(found, dict) and all(
                isinstance(found.get(name, kind()), kind) for name, kind in kinds.items()
            ):
                return found
        return {}

    def content_hash(self) -> str:
        """Hash of weights and charset; without provenance, which knows the weights, of the file, which has a date."""
        weights = self.provenance().get("model_hash") or hashlib.sha256(self.model_path.read_bytes()).hexdigest()
        return hashlib.sha256(weights.encode() + self.charset_path.read_bytes()).hexdigest()


def charset_hash(charset: str) -> str:
    """SHA-256 of a charset's JSON."""
    return hashlib.sha256(charset.encode()).hexdigest()


def make_provenance(
    model_hash: str,
    charset: str,
    feature_settings: dict[str, Any],
    content_hashes: Iterable[str],
    start: StartingPoint | None,
) -> dict[str, Any]:
    """What a network was made of, which its weights do not say.

    Args:
        model_hash: core.model.weights_hash of the network.
        charset: JSON of its charset.
        feature_settings: how its lines were normalised.
        content_hashes: of its training lines; those of the network that it started from are added.
        start: that network, or None.

    Returns:
        model_hash, charset_hash, feature_settings, start_from, learnt_lines (the hashes, shortened and sorted).
    """
    learnt = {content_hash[:_HASH_DIGITS] for content_hash in content_hashes}
    if start:
        learnt.update(start.provenance().get("learnt_lines", []))
    return {
        "model_hash": model_hash,
        "charset_hash": charset_hash(charset),
        "feature_settings": feature_settings,
        "start_from": start.name if start else None,
        "learnt_lines": sorted(learnt),
    }


def num_learnt(provenance: Mapping[str, Any], content_hashes: Iterable[str], training: Iterable[str]) -> int:
    """How many of the lines the network was trained on, itself or by the networks that it started from.

    Args:
        provenance: of the network.
        content_hashes: of the lines.
        training: of the present training lines. The same image among both is another matter, which validation reports.
    """
    learnt = set(provenance.get("learnt_lines", [])) - {content_hash[:_HASH_DIGITS] for content_hash in training}
    return sum(content_hash[:_HASH_DIGITS] in learnt for content_hash in content_hashes)


def _registered(uri: str, setting: str) -> tuple[str, Path]:
    """The URI with a version in place of an alias or of `latest`, and a folder with the files."""
    import mlflow
    from mlflow.exceptions import MlflowException

    if (database := database_of(mlflow.get_registry_uri())) and not database.exists():  # MLflow would make it
        raise UserError(
            f"{setting} = {uri!r}: no model has been registered, for there is no {database}. `kedro run` trains and "
            f"registers one; {setting} = {STARTER} takes the network that the package brings along."
        )
    found = uri.rstrip("/")
    model, at, alias = found.removeprefix("models:/").partition("@")
    try:
        client = mlflow.MlflowClient()
        if at:
            found = f"models:/{model}/{client.get_model_version_by_alias(model, alias).version}"
        elif model.endswith("/latest"):
            name = model.removesuffix("/latest")
            versions = client.search_model_versions(f"name = '{name}'", 1, ["version_number DESC"])
            found = f"models:/{name}/{versions[0].version}" if versions else found
        return found, _download(mlflow.get_registry_uri(), found)
    except (MlflowException, OSError) as exc:
        raise UserError(without_passwords(f"{setting} = {uri!r}: MLflow: {exc}")) from None


@functools.cache
def _download(registry: str, uri: str) -> Path:
    """The files of a registered version, once for each process."""
    import mlflow

    folder = tempfile.mkdtemp(dir=_downloads().name)
    return Path(mlflow.artifacts.download_artifacts(artifact_uri=f"{uri}/artifacts", dst_path=folder))


@functools.cache
def _downloads() -> tempfile.TemporaryDirectory[str]:
    """A folder that goes when the process ends by itself."""
    return tempfile.TemporaryDirectory(prefix="htr_pipeline-")
