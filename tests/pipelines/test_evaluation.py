"""The nodes between a trained network and its figures, on tables as the catalog holds them."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow.compute as pc
import pytest

from htr_pipeline.core.batching import Line
from htr_pipeline.core.calibration import Calibration
from htr_pipeline.core.config import UserError
from htr_pipeline.core.ctc.language_model import CharacterNGram
from htr_pipeline.core.image import ImageConfig, pixel_settings
from htr_pipeline.core.metrics import score_lines
from htr_pipeline.core.recipe import DECODERS, DecodingConfig, ModelConfig
from htr_pipeline.core.text import Charset
from htr_pipeline.io.manifest import FEATURES, PREDICTIONS, SPLITS, to_table
from htr_pipeline.io.starting_point import make_provenance
from htr_pipeline.pipelines.evaluation.nodes import (
    EvaluationConfig,
    calibrate_confidences,
    measure_errors,
    read_lines,
)

LETTERS = "abcdefgh "


class FewLines:
    """Features of few lines, held in memory, through the real schema."""

    def __init__(self, rows):
        self._table = to_table(rows, FEATURES)

    def figures(self):
        return self._table.drop_columns(["pixels"])

    def content_hashes(self):
        rows = self._table.to_pylist()
        return {split: [row["content_hash"] for row in rows if row["split"] == split] for split in SPLITS}

    def settings(self):
        return pixel_settings(ImageConfig(height_pixels=32))

    def data_hash(self, splits=()):
        return "-".join(splits)

    def lines(self, split):
        for row in self._table.to_pylist():
            if row["split"] == split:
                pixels = np.frombuffer(row["pixels"], np.uint8).reshape(row["width_pixels"], row["height_pixels"])
                yield Line(row["line_id"], pixels, row["text"])

    def spread(self, split, most):
        return list(self.lines(split))[:most]


def feature_row(rng, split, number):
    width = int(rng.integers(60, 200))
    return {
        "line_id": f"{split}-{number:03d}",
        "split": split,
        "writer_id": f"{split}-writer-{number % 4}",
        "group": "font" if number % 2 else None,
        "text": "".join(rng.choice(list(LETTERS[:-1]), size=12)),
        "pixels": rng.integers(0, 256, (width, 32), dtype=np.uint8).tobytes(),
        "width_pixels": width,
        "height_pixels": 32,
        "ink_share": 0.1,
        "contrast": 0.8,
        "slant_degrees": 0.0,
        "content_hash": f"{split}-{number}",
    }


def features(num_validation, num_test=6):
    rng = np.random.default_rng(1)
    numbers = {"train": 4, "validation": num_validation, "test": num_test}
    return FewLines(feature_row(rng, split, number) for split, num in numbers.items() for number in range(num))


def readings(num_validation, num_test, num_writers=4):
    """An over-confident reader: a character of confidence c is right with probability c ** 3."""
    rng = np.random.default_rng(2)
    rows = []
    for split, num in (("validation", num_validation), ("test", num_test)):
        for number in range(num):
            reference = "".join(rng.choice(list(LETTERS[:-1]), size=12))
            for decoder in DECODERS:
                confidences = rng.beta(30, 1, 12)
                wrong = rng.random(12) > confidences**3
                hypothesis = "".join("z" if bad else c for bad, c in zip(wrong, reference, strict=True))
                counts = score_lines([reference], [hypothesis]).characters
                rows.append(
                    {
                        "line_id": f"{split}-{number:03d}",
                        "split": split,
                        "writer_id": f"{split}-writer-{number % num_writers}",
                        "decoder": decoder,
                        "reference": reference,
                        "hypothesis": hypothesis,
                        "confidence": float(np.exp(np.log(confidences).mean())),
                        **{n: int(getattr(counts, n)[0]) for n in ("hits", "substitutions", "insertions", "deletions")},
                        "characters": [
                            {"character": c, "start_frame": i, "end_frame": i + 1, "confidence": float(confidence)}
                            for i, (c, confidence) in enumerate(zip(hypothesis, confidences, strict=True))
                        ],
                    }
                )
    return to_table(rows, PREDICTIONS, {"model_hash": "2d" * 32})


def provenance_of(model, charset, **settings):
    from htr_pipeline.core.model import weights_hash

    return make_provenance(
        weights_hash(model), charset, pixel_settings(ImageConfig(**{"height_pixels": 32} | settings)), [], None
    )


def measure(predictions, before, num_test=0, learnt=(), shards=None):
    charset = Charset(LETTERS).to_json()
    tuned = asdict(DecodingConfig(alpha=0.5, beta=0.0))
    return measure_errors(
        predictions,
        before,
        shards or features(0, num_test),
        charset,
        {"learnt_lines": learnt},
        tuned,
        EvaluationConfig(bootstrap_samples=100),
    )


def test_calibration_is_fitted_on_validation_lines_and_helps_on_test_lines():
    before = readings(300, 400)
    calibration, predictions = calibrate_confidences(before)
    metrics = measure(predictions, before)
    assert json.loads(json.dumps(metrics)) == metrics
    for decoder in DECODERS:
        for level, num in (("lines", 400), ("characters", 4800)):
            found = metrics["calibration"][decoder][level]
            assert found["before"]["num"] == found["after"]["num"] == num
            assert found["after"]["expected_calibration_error"] < found["before"]["expected_calibration_error"] / 2
            assert found["after"]["brier"] < found["before"]["brier"]
    only_validation, _ = calibrate_confidences(before.filter(pc.equal(before["split"], "validation")))
    assert calibration == only_validation


def test_lines_that_the_network_was_trained_on_are_counted_and_named(caplog):
    table = readings(4, 6)
    assert measure(table, table, 6)["learnt_lines"] == {"validation": 0, "test": 0}
    assert "was trained on" not in caplog.text
    assert measure(table, table, 6, ["test-1", "test-4", "train-1"])["learnt_lines"] == {"validation": 0, "test": 2}
    assert "The network that this one started from was trained on 2 of the 6 test lines" in caplog.text


def test_test_lines_whose_images_are_in_training_are_counted_and_named(caplog):
    table, rng = readings(4, 6), np.random.default_rng(1)
    rows = [feature_row(rng, split, number) for split in ("train", "test") for number in range(6)]
    assert measure(table, table, shards=FewLines(rows))["lines_in_training"] == {"validation": 0, "test": 0}
    assert "of a training line" not in caplog.text
    rows = [row | {"content_hash": row["content_hash"].replace("test-5", "train-2")} for row in rows]
    assert measure(table, table, shards=FewLines(rows))["lines_in_training"] == {"validation": 0, "test": 1}
    assert "1 of the 6 test lines have the image of a training line" in caplog.text


def test_interval_is_over_writers_and_of_few_writers_over_lines():
    several = readings(40, 40, num_writers=5)
    four = readings(40, 40)
    one = several.filter(pc.match_substring(several["writer_id"], "writer-0"))
    index = several.schema.get_field_index("writer_id")
    unknown = several.set_column(index, several.schema.field("writer_id"), several["line_id"])
    for predictions, unit in ((several, "writers"), (four, "lines"), (one, "lines"), (unknown, "lines")):
        score = measure(predictions, predictions)["splits"]["test"]["greedy"]
        assert score["interval_over"] == unit
        assert score["cer_low"] < score["cer"] < score["cer_high"]


def test_calibration_changes_confidences_and_nothing_else():
    before = readings(40, 10)
    calibration, predictions = calibrate_confidences(before)
    assert predictions.schema.equals(before.schema, check_metadata=True)
    keys = [(name, "ascending") for name in ("decoder", "split", "line_id")]
    rows, old = predictions.sort_by(keys).to_pylist(), before.sort_by(keys).to_pylist()
    for row, raw in zip(rows, old, strict=True):
        maps = {level: Calibration(**fitted) for level, fitted in calibration[row["decoder"]].items()}
        assert row.pop("confidence") == pytest.approx(maps["lines"]([raw.pop("confidence")])[0], rel=1e-6)
        values = [character.pop("confidence") for character in raw["characters"]]
        np.testing.assert_allclose(
            [character.pop("confidence") for character in row["characters"]], maps["characters"](values), rtol=1e-6
        )
        assert row == raw


def test_few_validation_lines_leave_confidences_as_they_are_and_say_so(caplog):
    before = readings(31, 10)
    with caplog.at_level("WARNING"):
        calibration, predictions = calibrate_confidences(before)
    assert calibration == {}
    assert predictions.equals(before)
    assert "takes 32 validation lines, there are 31" in caplog.text
    found = measure(predictions, before)["calibration"]["beam_lm"]["lines"]
    assert found["before"] == found["after"]


def test_lines_read_as_empty_do_not_stop_anything():
    rows = readings(40, 10).to_pylist()
    for row in rows:
        row |= {"hypothesis": "", "characters": [], "hits": 0, "deletions": 12, "substitutions": 0}
    before = to_table(rows, PREDICTIONS, {"model_hash": "2d" * 32})
    metrics = measure(calibrate_confidences(before)[1], before)
    assert metrics["calibration"]["greedy"]["characters"]["after"]["num"] == 0


def test_network_computes_every_line_once_and_every_decoder_reads_it(monkeypatch, caplog):
    pytest.importorskip("keras")
    from htr_pipeline.core.inference import Network
    from htr_pipeline.core.model import build_model

    computed, compute = [], Network.log_probs

    def counted(self, lines, looks):
        computed.extend(line.line_id for line in lines)
        return compute(self, lines, looks)

    monkeypatch.setattr(Network, "log_probs", counted)
    charset = Charset(LETTERS)
    model = build_model(ModelConfig(size="XS"), charset.num_classes, 32, seed=1)
    tuned, table = read_lines(
        features(5, 3),
        model,
        charset.to_json(),
        provenance_of(model, charset.to_json()),
        CharacterNGram.train(["abc def", "gh"], order=2),
        "abc\ndef\n",
        DecodingConfig(beam_width=3, lexicon="open", alpha=0.3, hot_words={"abc": 1.0, "Österreich": 2.0}),
    )
    assert "cannot write the hot words Österreich:" in caplog.text
    assert sorted(computed) == sorted({*table["line_id"].to_pylist()})
    assert len(computed) == 8
    assert len(table) == 8 * len(DECODERS)
    assert (tuned["alpha"], tuned["lexicon"]) == (0.3, "open")
    assert isinstance(tuned["beta"], float)


def test_network_is_not_read_with_what_belongs_to_another_one(caplog):
    pytest.importorskip("keras")
    from htr_pipeline.core.model import build_model

    model, other = (build_model(ModelConfig(size="XS"), 10, 32, seed=seed) for seed in (1, 2))
    charset = Charset(LETTERS).to_json()
    language = CharacterNGram.train(["abc def", "gh"], order=2)

    def read(provenance):
        return read_lines(features(2, 1), model, charset, provenance, language, "", DecodingConfig(beam_width=2))

    for wrong in (provenance_of(model, Charset("hgfedcba ").to_json()), provenance_of(other, charset)):
        with pytest.raises(UserError, match=r"are of two trainings.*kedro run --from-nodes collect_charset"):
            read(wrong)
    with pytest.raises(UserError, match=r"height_pixels = 48, here 32\. It cannot read lines of another height"):
        read(provenance_of(model, charset, height_pixels=48))
    read(provenance_of(model, charset, binarise=True))
    assert "other settings of features: binarise = True, here False. It reads these worse" in caplog.text
