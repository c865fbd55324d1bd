"""Nodes: models, charset, lexicon, features → tuned decoding, readings, calibration, predictions, metrics."""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import islice, starmap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from htr_pipeline.core.batching import Line
from htr_pipeline.core.calibration import Calibration, fit_calibration, reliability, right_characters
from htr_pipeline.core.config import UserError, config, setting
from htr_pipeline.core.image import differing_settings
from htr_pipeline.core.metrics import bootstrap_interval, independent_groups, score_lines, signature
from htr_pipeline.core.recipe import DECODERS, DecodingConfig
from htr_pipeline.core.text import Charset, unicode_form_of
from htr_pipeline.io.features import FeatureShards
from htr_pipeline.io.manifest import PREDICTIONS, to_table
from htr_pipeline.io.starting_point import charset_hash, num_learnt

if TYPE_CHECKING:
    from htr_pipeline.core.inference import Reading

logger = logging.getLogger(__name__)

_SPLITS = ("validation", "test")
# Lines whose network outputs are in memory at the same time.
_CHUNK_LINES = 256
# What is tried for the language model's weight and the bonus of a character, and on how many lines at most.
_ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
_BETAS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
_TUNING_LINES = 512
# With fewer validation lines, confidences stay as they are.
_FEWEST_CALIBRATION_LINES = 32


@config("evaluation")
class EvaluationConfig:
    """How far the figures can be trusted."""

    confidence: float = setting(default=0.95, minimum=0.5, maximum=0.999)
    bootstrap_samples: int = setting(default=1000, minimum=100)
    seed: int = setting(default=1, minimum=0, maximum=2**32 - 1)


def read_lines(
    features: FeatureShards,
    model: Any,
    charset: str,
    provenance: dict[str, Any],
    language_model: Any,
    lexicon: str,
    decoding: DecodingConfig,
) -> tuple[dict[str, Any], pa.Table]:
    """Features, models, charset → tuned_decoding, readings: validation and test lines read with every decoder.

    Tuning and reading are one node, so that the network computes every validation line once.
    """
    from htr_pipeline.core.inference import Network
    from htr_pipeline.core.model import weights_hash

    _check_parts(features, model, charset, provenance)
    characters = Charset.from_json(charset)
    network, known = Network(model, characters), decoding.build_lexicon(lexicon.split(), characters)
    unwritable = [word for word in decoding.normalised_hot_words(characters) if characters.unknown(word)]
    if unwritable:
        logger.warning("The network cannot write the hot words %s: no training text has all their characters.",
                       ", ".join(unwritable))  # fmt: skip
    columns = features.figures().select(["line_id", "split", "writer_id", "group"]).to_pylist()
    lines_by_id = {row["line_id"]: row for row in columns if row["split"] in _SPLITS}

    tuning_lines = features.spread("validation", _TUNING_LINES)
    tuning_log_probs = network.log_probs(tuning_lines, decoding.looks)
    computed = dict(zip((line.line_id for line in tuning_lines), tuning_log_probs, strict=True))

    def read(lines: list[Line], setting: DecodingConfig) -> "list[Reading]":
        log_probs = [computed[line.line_id] for line in lines]
        return network.decode(log_probs, setting, language_model, known)

    tuned = _tune(tuning_lines, read, decoding)
    rows = []
    with tqdm(total=len(lines_by_id), desc="Reading", unit="line") as bar:
        for lines in _chunks(line for split in _SPLITS for line in features.lines(split)):
            new = [line for line in lines if line.line_id not in computed]
            computed |= zip((line.line_id for line in new), network.log_probs(new, decoding.looks), strict=True)
            for decoder in DECODERS:
                rows += _rows(lines_by_id, decoder, lines, read(lines, replace(tuned, decoder=decoder)))
            for line in lines:
                del computed[line.line_id]
            bar.update(len(lines))
    return asdict(tuned), to_table(rows, PREDICTIONS, {"model_hash": weights_hash(model)})


def _check_parts(features: FeatureShards, model: Any, charset: str, provenance: Mapping[str, Any]) -> None:
    """Files that a killed run or single pipelines have left may be of several trainings.

    Raises:
        UserError: the network cannot read with this charset, or lines of this height.
    """
    from htr_pipeline.core.model import weights_hash

    if (provenance["model_hash"], provenance["charset_hash"]) != (weights_hash(model), charset_hash(charset)):
        raise UserError(
            "The network on disk and the charset beside it are of two trainings: it would write other characters than "
            "it means. Train it again, which takes up what was interrupted: kedro run --from-nodes collect_charset"
        )
    if different := differing_settings(provenance["feature_settings"], features.settings()):
        words = f"The network was trained on lines with other settings of features: {'; '.join(different)}."
        if provenance["feature_settings"]["height_pixels"] != features.settings()["height_pixels"]:
            raise UserError(f"{words} It cannot read lines of another height: kedro run --from-nodes train_network")
        logger.warning("%s It reads these worse.", words)


def _tune(
    lines: list[Line], read: "Callable[[list[Line], DecodingConfig], list[Reading]]", decoding: DecodingConfig
) -> DecodingConfig:
    """The settings with the alpha and beta that make the fewest character errors on the lines."""
    alphas = _ALPHAS if decoding.alpha is None else (decoding.alpha,)
    betas = _BETAS if decoding.beta is None else (decoding.beta,)
    texts = [line.text for line in lines]
    tried = []
    for alpha, beta in tqdm(list(itertools.product(alphas, betas)), desc="Tuning", unit="setting"):
        readings = read(lines, replace(decoding, decoder="beam_lm", alpha=alpha, beta=beta))
        tried.append((score_lines(texts, [reading.text for reading in readings]).cer, alpha, beta))
    cer, alpha, beta = min(tried)  # of equals the least of the language model
    logger.info("Beam search with alpha %.2f and beta %.1f reads the validation lines best: CER %.2f %%.",
                alpha, beta, 100 * cer)  # fmt: skip
    return replace(decoding, alpha=alpha, beta=beta)


def _rows(
    lines_by_id: Mapping[str, dict[str, Any]], decoder: str, lines: list[Line], readings: "list[Reading]"
) -> Iterator[dict[str, Any]]:
    """Rows of PREDICTIONS."""
    counts = score_lines([line.text for line in lines], [reading.text for reading in readings]).characters
    for index, (line, reading) in enumerate(zip(lines, readings, strict=True)):
        yield {
            **lines_by_id[line.line_id],
            "decoder": decoder,
            "reference": line.text,
            "hypothesis": reading.text,
            "confidence": reading.confidence,
            **{name: int(of_lines[index]) for name, of_lines in vars(counts).items()},
            "characters": [
                dict(zip(("character", "start_frame", "end_frame", "confidence"), values, strict=True))
                for values in reading.characters
            ],
        }


def calibrate_confidences(readings: pa.Table) -> tuple[dict[str, Any], pa.Table]:
    """Readings → calibration, predictions: confidences as probabilities of being right, fitted on validation lines."""
    is_validation = pc.field("split") == "validation"
    num_lines = len(readings.filter(is_validation)) // len(DECODERS)
    if num_lines < _FEWEST_CALIBRATION_LINES:
        logger.warning("Confidences stay as the decoders give them: to calibrate them takes %d validation lines, "
                       "there are %d.", _FEWEST_CALIBRATION_LINES, num_lines)  # fmt: skip
        return {}, readings
    calibration, parts = {}, []
    for decoder in DECODERS:
        own = readings.filter(pc.field("decoder") == decoder)
        outcomes = _outcomes(own.filter(is_validation))
        fitted = {level: fit_calibration(*known) for level, known in outcomes.items()}
        calibration[decoder] = {level: asdict(parameters) for level, parameters in fitted.items()}
        parts.append(_calibrated(own, fitted))
    return calibration, pa.concat_tables(parts)


def _outcomes(readings: pa.Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Confidences of lines and of characters, and which of them are right."""
    texts = list(zip(readings["reference"].to_pylist(), readings["hypothesis"].to_pylist(), strict=True))
    characters = pc.struct_field(pc.list_flatten(readings["characters"]), "confidence")
    return {
        "lines": (readings["confidence"].to_numpy(), np.array([left == right for left, right in texts], bool)),
        "characters": (characters.to_numpy(), np.concatenate([np.empty(0, bool), *starmap(right_characters, texts)])),
    }


def _calibrated(readings: pa.Table, maps: Mapping[str, Calibration]) -> pa.Table:
    """The readings with other confidences."""
    characters = readings["characters"].combine_chunks()
    fields = dict(zip(characters.type.value_type.names, characters.flatten().flatten(), strict=True))
    fields["confidence"] = pa.array(maps["characters"](fields["confidence"].to_numpy()), pa.float32())
    structs = pa.StructArray.from_arrays(list(fields.values()), fields=list(characters.type.value_type))
    offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(characters).to_numpy())])
    columns = {
        "confidence": pa.array(maps["lines"](readings["confidence"].to_numpy()), pa.float32()),
        "characters": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs, type=characters.type),
    }
    for name, column in columns.items():
        index = readings.schema.get_field_index(name)
        readings = readings.set_column(index, readings.schema.field(index), column)
    return readings


def measure_errors(
    predictions: pa.Table,
    readings: pa.Table,
    features: FeatureShards,
    charset: str,
    provenance: dict[str, Any],
    tuned_decoding: dict[str, Any],
    evaluation: EvaluationConfig,
) -> dict[str, Any]:
    """Predictions, and readings before calibration → metrics."""
    decoding = DecodingConfig(**tuned_decoding)
    table = predictions.drop_columns(["characters"]).to_pandas()
    table["group"] = table["group"].astype(object).where(table["group"].notna(), None)
    test = table[(table["split"] == "test") & (table["decoder"] == decoding.decoder)]
    figures = features.figures()
    seen = set(figures.filter(pc.equal(figures["split"], "train"))["group"].to_pylist())
    grouped = test.dropna(subset="group")
    known = Charset.from_json(charset)
    hashes = features.content_hashes()
    learnt = {split: num_learnt(provenance, hashes[split], hashes["train"]) for split in _SPLITS}
    for split, num in learnt.items():
        if num:
            logger.warning(
                "The network that this one started from was trained on %d of the %d %s lines: its figures on them say "
                "nothing about new lines. Keep to the splits of then, give them in the source, or start from another "
                "network.", num, len(hashes[split]), split,
            )  # fmt: skip
    trained = set(hashes["train"])
    in_training = {split: sum(one in trained for one in hashes[split]) for split in _SPLITS}
    for split, num in in_training.items():
        if num:
            logger.warning(
                "%d of the %d %s lines have the image of a training line: its figures on them say nothing about new "
                "lines. The table of the validation names them (same_image).", num, len(hashes[split]), split,
            )  # fmt: skip
    outside = Counter("".join(test["reference"]))
    return {
        "signature": signature(unicode_form_of(test["reference"].tolist()), "test", len(test), version("htr-pipeline")),
        "data_hash": features.data_hash(),
        "test_hash": features.data_hash(("test",)),
        "model_hash": predictions.schema.metadata[b"model_hash"].decode(),
        "confidence": evaluation.confidence,
        "learnt_lines": learnt,
        "lines_in_training": in_training,
        "decoders": list(DECODERS),
        "headline": {"split": "test", "decoder": decoding.decoder},
        "decoding": tuned_decoding,
        "splits": {
            split: {
                decoder: _score(table[(table["split"] == split) & (table["decoder"] == decoder)], evaluation)
                for decoder in DECODERS
            }
            for split in _SPLITS
        },
        "calibration": {decoder: _reliabilities(readings, predictions, decoder) for decoder in DECODERS},
        "writers": [{"writer_id": name, "split": "test", **_rate(part)} for name, part in test.groupby("writer_id")],
        "groups": [
            {"group": name, "seen_in_training": name in seen, **_rate(part)} for name, part in grouped.groupby("group")
        ],
        "seen_groups": _rate(grouped[grouped["group"].isin(seen)]),
        "unseen_groups": _rate(grouped[~grouped["group"].isin(seen)]),
        "characters_outside_charset": {c: count for c, count in sorted(outside.items()) if c not in known},
    }


def _score(lines: pd.DataFrame, evaluation: EvaluationConfig) -> dict[str, Any]:
    score = score_lines(lines["reference"].tolist(), lines["hypothesis"].tolist())
    groups = independent_groups(lines["writer_id"].tolist())
    intervals = {
        name: bootstrap_interval(
            counts.edits,
            counts.lengths,
            groups,
            confidence=evaluation.confidence,
            num_samples=evaluation.bootstrap_samples,
            seed=evaluation.seed,
        )
        for name, counts in (("cer", score.characters), ("wer", score.words))
    }
    return {
        "num_lines": score.num_lines,
        "num_characters": score.num_characters,
        "num_words": score.num_words,
        "cer": score.cer,
        "cer_low": intervals["cer"][0],
        "cer_high": intervals["cer"][1],
        "wer": score.wer,
        "wer_low": intervals["wer"][0],
        "wer_high": intervals["wer"][1],
        "interval_over": "lines" if groups is None else "writers",
        "macro_cer": score.macro_cer,
        "line_accuracy": score.line_accuracy,
        **{name: int(of_lines.sum()) for name, of_lines in vars(score.characters).items()},
    }


def _reliabilities(readings: pa.Table, predictions: pa.Table, decoder: str) -> dict[str, Any]:
    """Of the test lines and their characters: whether confidences keep their word, before and after calibration."""
    wanted = (pc.field("split") == "test") & (pc.field("decoder") == decoder)
    before, after = (_outcomes(table.filter(wanted)) for table in (readings, predictions))
    return {
        level: {"before": asdict(reliability(*before[level])), "after": asdict(reliability(*after[level]))}
        for level in before
    }


def _rate(lines: pd.DataFrame) -> dict[str, Any] | None:
    if lines.empty:
        return None
    score = score_lines(lines["reference"].tolist(), lines["hypothesis"].tolist())
    return {"num_lines": score.num_lines, "num_characters": score.num_characters, "cer": score.cer}


def _chunks(lines: Iterable[Line]) -> Iterator[list[Line]]:
    iterator = iter(lines)
    while chunk := list(islice(iterator, _CHUNK_LINES)):
        yield chunk
