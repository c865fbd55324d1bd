"""The model as MLflow keeps and serves it: everything that is needed to read a line image, and no pickle.

MLflow stores this file beside the artifacts ("models from code") and runs it when the model is loaded.
"""

import base64
import binascii
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from htr_pipeline.core.batching import Line
from htr_pipeline.core.calibration import Calibration
from htr_pipeline.core.config import UserError
from htr_pipeline.core.ctc.language_model import load_language_model
from htr_pipeline.core.image import ImageConfig, normalise_line, pixel_settings, read_image, recorded_settings
from htr_pipeline.core.recipe import DecodingConfig
from htr_pipeline.core.text import Charset

# Lines normalised and read at a time: the bound of memory on long lists.
_CHUNK_LINES = 256


def signature(decoding: DecodingConfig) -> ModelSignature:
    """Text, confidence and error out; the decoder as parameters.

    No schema of the images: one with a name refuses plain lists, one without takes whichever column is the first.
    """
    return ModelSignature(
        outputs=Schema(
            [
                ColSpec(DataType.string, "text", required=False),
                ColSpec(DataType.double, "confidence", required=False),
                ColSpec(DataType.string, "error", required=False),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("decoder", DataType.string, decoding.decoder),
                ParamSpec("beam_width", DataType.long, decoding.beam_width),
                ParamSpec("looks", DataType.long, decoding.looks),
                ParamSpec("alpha", DataType.double, decoding.alpha),
                ParamSpec("beta", DataType.double, decoding.beta),
            ]
        ),
    )


def settings_text(image_config: ImageConfig, decoding: DecodingConfig, calibration: Mapping[str, Any]) -> str:
    """What reading a line depends on beside the models: settings of lines and decoder, and the calibration."""
    settings = {"features": pixel_settings(image_config), "decoding": asdict(decoding), "calibration": calibration}
    return json.dumps(settings, ensure_ascii=False, indent=1)


class LineReader(mlflow.pyfunc.PythonModel):
    """Reads line images: a list, or the column image of a DataFrame, of paths or bytes of PNG, JPEG or TIFF files.

    A list may also have (height, width) uint8 arrays, grey.

    Over REST an image is base64 text, and paths are not opened: a request must not read the server's files.
    """

    # MLflow would warn at every load that predict has no type hints, of which it would make a schema of its own.
    _skip_type_hint_validation = True

    def load_context(self, context: Any) -> None:
        """Loads network, charset, language model, lexicon and settings from the model's artifacts."""
        self.load({name: Path(path) for name, path in context.artifacts.items()})

    def load(self, files: Mapping[str, Path], network: Any = None) -> "LineReader":
        """Loads what reading needs; returns itself.

        Args:
            files: network and charset, provenance; and settings, language_model and lexicon, without which lines are
                read greedily and their confidences are not calibrated.
            network: the first of these, if it is loaded already.

        Raises:
            UserError: the network takes lines of another height than the settings say.
        """
        import keras

        import htr_pipeline.core.model  # noqa: F401  registers the layers
        from htr_pipeline.core.inference import Network

        charset = Charset.from_json(files["charset"].read_text(encoding="utf-8"))
        self.provenance = json.loads(files["provenance"].read_text(encoding="utf-8")) if "provenance" in files else {}
        settings = {
            "features": self.provenance.get("feature_settings", {}),  # with versions of libraries
            "decoding": {"decoder": "greedy"},
            "calibration": {},
        }
        self._language_model = self._lexicon = None
        if "settings" in files:
            settings = json.loads(files["settings"].read_text(encoding="utf-8"))
            self._language_model = load_language_model(files["language_model"])
            words = files["lexicon"].read_text(encoding="utf-8").split()
            self._lexicon = DecodingConfig(**settings["decoding"]).build_lexicon(words, charset)
        self._decoding = settings["decoding"]
        self._calibrations = {
            decoder: {level: Calibration(**fitted) for level, fitted in levels.items()}
            for decoder, levels in settings["calibration"].items()
        }
        network = network or keras.models.load_model(files["network"], compile=False, safe_mode=True)
        height = network.inputs[0].shape[-1]
        self.image_config = ImageConfig(**({"height_pixels": height} | recorded_settings(settings["features"])))
        if self.image_config.height_pixels != height:
            raise UserError(
                f"The settings beside the network are of lines {self.image_config.height_pixels} pixels high, and it "
                f"takes lines of {height}: these files do not belong together. Copy all that lay beside the network."
            )
        self._network = Network(network, charset, self._calibrations)
        return self

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """One row for each image: text, confidence, and the error where the image could not be read.

        The confidence is the probability that the line is read without an error, as calibrated on validation lines.
        """
        try:
            decoding = self.decoding(**(params or {}))
            images = _images(model_input)
        except UserError as exc:  # of another kind, MLflow would hide it from those who ask over REST
            raise MlflowException.invalid_parameter_value(str(exc)) from None
        rows = []
        for start in range(0, len(images), _CHUNK_LINES):
            rows += self.read(images[start : start + _CHUNK_LINES], decoding)
        answer = pd.DataFrame(rows, columns=["text", "confidence", "error"])
        # pandas has NaN for what is missing, which is no JSON.
        return answer.astype(object).where(answer.notna(), None) if _is_served() else answer

    def decoding(self, **asked: Any) -> DecodingConfig:
        """How the model decodes, with what is asked for in place of its own settings; None asks for nothing.

        Raises:
            UserError: a setting that there is not, or beam_lm of a model without a language model.
        """
        asked = {name: value for name, value in asked.items() if value is not None}
        decoding = DecodingConfig(**{**self._decoding, **asked})
        if decoding.decoder == "beam_lm" and self._language_model is None:
            raise UserError("decoder = 'beam_lm': this network comes without a language model. Take greedy or beam.")
        return decoding

    def is_calibrated(self, decoder: str) -> bool:
        """Whether the confidence of a line is a probability that was fitted on validation lines."""
        return "lines" in self._calibrations.get(decoder, {})

    def read(
        self, images: Iterable[Any], decoding: DecodingConfig
    ) -> list[tuple[str | None, float | None, str | None]]:
        """Text, confidence and error of each image; as normalised lines they are in memory together."""
        lines, errors = [], {}
        for index, image in enumerate(images):
            try:
                pixels = normalise_line(_grey(image), self.image_config).pixels
                lines.append(Line(str(index), pixels, ""))
            except UserError as exc:
                errors[index] = str(exc)
        log_probs = self._network.log_probs(lines, decoding.looks)
        readings = iter(self._network.decode(log_probs, decoding, self._language_model, self._lexicon))
        rows: list[tuple[str | None, float | None, str | None]] = []
        for index in range(len(lines) + len(errors)):
            if index in errors:
                rows.append((None, None, errors[index]))
            else:
                reading = next(readings)
                rows.append((reading.text, reading.confidence, None))
        return rows


def _is_served() -> bool:
    """Whether this is MLflow's scoring server: the one place where input comes from strangers."""
    return "mlflow.pyfunc.scoring_server.app" in sys.modules


def _images(model_input: pd.DataFrame | Mapping[str, Any] | Iterable[Any]) -> list[Any]:
    if isinstance(model_input, Mapping):  # of a request's "inputs", which has columns too
        columns = {name: _as_list(column) for name, column in model_input.items()}
        if len(set(map(len, columns.values()))) > 1:
            raise UserError("The columns have not equally many values: " + ", ".join(map(str, columns)) + ".")
        model_input = pd.DataFrame(columns)
    if not isinstance(model_input, pd.DataFrame):
        is_array = isinstance(model_input, np.ndarray) and model_input.dtype == np.uint8
        if is_array and model_input.ndim == 3 and model_input.shape[-1] in (3, 4):  # it would be a line for each row
            raise UserError(
                f"An array of shape {model_input.shape} looks like one image in colour. Expected (height, width) of "
                "grey: give its mean over the last axis as uint8, or the file."
            )
        return [model_input] if is_array and model_input.ndim == 2 else _as_list(model_input)
    if "image" in model_input:
        if model_input.columns.tolist().count("image") > 1:
            raise UserError("There are several columns image: expected one.")
        return list(model_input["image"])
    if model_input.empty:  # of an empty list of records, which has no columns
        return []
    if len(model_input.columns) != 1:
        raise UserError(f"The columns are {', '.join(map(str, model_input.columns))}: expected a column image.")
    return list(model_input.iloc[:, 0])


def _as_list(column: Any) -> list[Any]:
    """The values of a column, which may be a single one. NumPy would cut zeros off the end of bytes."""
    if isinstance(column, np.ndarray) and not column.ndim:
        return [column.item()]
    if isinstance(column, str | bytes | bytearray | memoryview | Path) or not isinstance(column, Iterable):
        return [column]
    return list(column)


def _grey(image: Any) -> np.ndarray:
    """(height, width) uint8."""
    if not isinstance(image, np.ndarray) or _is_served():
        return read_image(_source(image))
    if image.ndim != 2 or image.dtype != np.uint8:
        raise UserError(f"an array must be (height, width) uint8, grey, got {image.shape} {image.dtype}.")
    return image


def _source(image: Any) -> Path | bytes:
    if isinstance(image, bytes | bytearray | memoryview | np.bytes_):
        return bytes(image)
    if _is_served():
        try:
            return base64.b64decode("".join(image.split()), validate=True)  # with line breaks, as some write it
        except (binascii.Error, ValueError, AttributeError):
            raise UserError("the image must be the base64 text of a PNG, JPEG or TIFF file.") from None
    if isinstance(image, str | Path):
        return Path(image)
    raise UserError(f"an image is given as a path, as bytes or as an array, got {type(image).__name__}.")


mlflow.models.set_model(LineReader())
