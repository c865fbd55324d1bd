"""Nodes: model, charset, language model, features → tuned decoding, predictions, metrics."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import islice
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from htr_pipeline.core.batching import Line
from htr_pipeline.core.config import config, setting
from htr_pipeline.core.metrics import bootstrap_interval, score_lines, signature
from htr_pipeline.core.recipe import DECODERS, DecodingConfig
from htr_pipeline.core.text import Charset
from htr_pipeline.io.features import FeatureShards
from htr_pipeline.io.manifest import PREDICTIONS, to_table

logger = logging.getLogger(__name__)

_SPLITS = ("validation", "test")
# Lines whose network outputs are in memory at the same time.
_CHUNK_LINES = 256
# What is tried for the language model's weight and the bonus of a character, and on how many lines at most.
_ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
_BETAS = (0.0, 0.5, 1.0, 1.5, 2.0)
_TUNING_LINES = 512


@config("evaluation")
class EvaluationConfig:
    """How far the figures can be trusted."""

    confidence: float = setting(default=0.95, minimum=0.5, maximum=0.999)
    bootstrap_samples: int = setting(default=1000, minimum=100)
    seed: int = setting(default=1, minimum=0)


def tune_decoding(
    features: FeatureShards, model: Any, charset: str, language_model: Any, decoding: DecodingConfig
) -> dict[str, Any]:
    """Features, model, language model → tuned_decoding: alpha and beta by the CER of the validation lines."""
    from htr_pipeline.core.inference import Network

    network = Network(model, Charset.from_json(charset))
    lines = features.spread("validation", _TUNING_LINES)
    log_probs, texts = network.log_probs(lines), [line.text for line in lines]
    alphas = _ALPHAS if decoding.alpha is None else (decoding.alpha,)
    betas = _BETAS if decoding.beta is None else (decoding.beta,)
    tried = []
    for alpha, beta in tqdm(list(itertools.product(alphas, betas)), desc="Tuning", unit="setting"):
        setting = replace(decoding, decoder="beam_lm", alpha=alpha, beta=beta)
        readings = network.decode(log_probs, setting, language_model)
        tried.append((score_lines(texts, [reading.text for reading in readings]).cer, alpha, beta))
    cer, alpha, beta = min(tried)  # of equals the least of the language model
    logger.info("Beam search with alpha %.2f and beta %.1f reads the validation lines best: CER %.2f %%.",
                alpha, beta, 100 * cer)  # fmt: skip
    return asdict(replace(decoding, alpha=alpha, beta=beta))


def read_lines(
    features: FeatureShards, model: Any, charset: str, language_model: Any, tuned_decoding: dict[str, Any]
) -> pa.Table:
    """Features, models, charset → predictions: validation and test lines read with every decoder."""
    from htr_pipeline.core.inference import Network

    network, decoding = Network(model, Charset.from_json(charset)), DecodingConfig(**tuned_decoding)
    columns = features.figures().select(["line_id", "split", "writer_id", "group"]).to_pylist()
    lines_by_id = {row["line_id"]: row for row in columns if row["split"] in _SPLITS}
    rows = []
    with tqdm(total=len(lines_by_id), desc="Reading", unit="line") as bar:
        for lines in _chunks(line for split in _SPLITS for line in features.lines(split)):
            log_probs = network.log_probs(lines)
            for decoder in DECODERS:
                readings = network.decode(log_probs, replace(decoding, decoder=decoder), language_model)
                counts = score_lines([line.text for line in lines], [reading.text for reading in readings]).characters
                for index, (line, reading) in enumerate(zip(lines, readings, strict=True)):
                    rows.append(
                        {
                            **lines_by_id[line.line_id],
                            "decoder": decoder,
                            "reference": line.text,
                            "hypothesis": reading.text,
                            "confidence": reading.confidence,
                            "hits": int(counts.hits[index]),
                            "substitutions": int(counts.substitutions[index]),
                            "insertions": int(counts.insertions[index]),
                            "deletions": int(counts.deletions[index]),
                            "characters": [
                                dict(zip(("character", "start_frame", "end_frame", "confidence"), values, strict=True))
                                for values in reading.characters
                            ],
                        }
                    )
            bar.update(len(lines))
    return to_table(rows, PREDICTIONS)


def measure_errors(
    predictions: pa.Table,
    features: FeatureShards,
    feature_stats: dict[str, Any],
    charset: str,
    tuned_decoding: dict[str, Any],
    evaluation: EvaluationConfig,
) -> dict[str, Any]:
    """Predictions → metrics."""
    decoding = DecodingConfig(**tuned_decoding)
    table = predictions.drop_columns(["characters"]).to_pandas()
    table["group"] = table["group"].astype(object).where(table["group"].notna(), None)
    test = table[(table["split"] == "test") & (table["decoder"] == decoding.decoder)]
    figures = features.figures()
    seen = set(figures.filter(pc.equal(figures["split"], "train"))["group"].to_pylist())
    grouped = test.dropna(subset="group")
    known = Charset.from_json(charset)
    outside = Counter("".join(test["reference"]))
    return {
        "signature": signature("NFC", "test", len(test), version("htr-pipeline")),
        "data_hash": feature_stats["data_hash"],
        "test_hash": features.data_hash(("test",)),
        "confidence": evaluation.confidence,
        "decoders": list(DECODERS),
        "headline": {"split": "test", "decoder": decoding.decoder},
        "language_model": {"alpha": decoding.alpha, "beta": decoding.beta},
        "splits": {
            split: {
                decoder: _score(table[(table["split"] == split) & (table["decoder"] == decoder)], evaluation)
                for decoder in DECODERS
            }
            for split in _SPLITS
        },
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
    intervals = {
        name: bootstrap_interval(
            counts.edits,
            counts.lengths,
            lines["writer_id"].to_numpy(),
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
        "macro_cer": score.macro_cer,
        "line_accuracy": score.line_accuracy,
        **{
            name: int(getattr(score.characters, name).sum())
            for name in ("hits", "substitutions", "insertions", "deletions")
        },
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
