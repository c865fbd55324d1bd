"""The served class on the artifacts of a model, without a registry: tests/test_run.py has that."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image, ImageDraw

from htr_pipeline.core.calibration import Calibration
from htr_pipeline.core.config import UserError
from htr_pipeline.core.ctc.language_model import CharacterNGram, WordNGram
from htr_pipeline.core.image import ImageConfig
from htr_pipeline.core.recipe import DecodingConfig, ModelConfig
from htr_pipeline.core.text import Charset

keras = pytest.importorskip("keras")

from htr_pipeline.core.model import build_model  # noqa: E402  after TensorFlow is known to be there
from htr_pipeline.mlflow_model import LineReader, settings_text  # noqa: E402

CHARSET = Charset(" abcde")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """An untrained network whose frames are not all alike: it reads some nonsense."""
    model = build_model(ModelConfig(size="XS"), CHARSET.num_classes, 32, seed=2)
    path = tmp_path_factory.mktemp("network") / "network.keras"
    model.save(path)
    return path


def reader(folder, network, decoding, *, language_model=None, words="", calibration=None):
    (folder / "charset.json").write_text(CHARSET.to_json(), encoding="utf-8")
    (folder / "lexicon.txt").write_text(words, encoding="utf-8")
    (language_model or CharacterNGram.train(["abc", "bad cab"], 2)).save(folder / "language_model.npz")
    settings = settings_text(ImageConfig(height_pixels=32), decoding, calibration or {})
    (folder / "settings.json").write_text(settings, encoding="utf-8")
    return load(folder, network)


def load(folder, network):
    files = [network, *folder.iterdir()]
    loaded = LineReader()
    loaded.load_context(SimpleNamespace(artifacts={path.stem: str(path) for path in files}))
    return loaded


@pytest.fixture(scope="module")
def images():
    def image(text):
        picture = Image.new("L", (160, 40), 255)
        ImageDraw.Draw(picture).text((10, 12), text, fill=0)
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        return stream.getvalue()

    return [image(text) for text in ("a cab", "dead bee", "ace")]


def test_settings_hold_nothing_of_the_machine_and_those_of_older_models_are_read(tmp_path, network, images):
    loaded = reader(tmp_path, network, DecodingConfig(decoder="greedy"))
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert not settings["features"].keys() & {"dask_address", "num_workers", "shard_lines"}
    settings["features"] |= {"dask_address": "tcp://scheduler:8786", "num_workers": 3, "shard_lines": 512}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    older = load(tmp_path, network)
    assert read(older, images)["text"].tolist() == read(loaded, images)["text"].tolist()
    assert older.image_config.even_size
    del settings["features"]["even_size"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert not load(tmp_path, network).image_config.even_size, "registered before there was this setting"


def read(loaded, images, **params):
    return loaded.predict(None, pd.DataFrame({"image": images}), params or None)


def test_served_confidences_are_the_calibrated_ones(tmp_path, network, images):
    decoding = DecodingConfig(alpha=0.3, beta=0.5, beam_width=5)
    calibration = {"beam_lm": {"lines": {"a": 0.5, "b": 2.0, "c": 1.0}, "characters": {"a": 1.0, "b": 1.0, "c": 0.0}}}
    raw = read(reader(tmp_path, network, decoding), images)
    calibrated = reader(tmp_path, network, decoding, calibration=calibration)
    found = read(calibrated, images)
    assert found["text"].tolist() == raw["text"].tolist()
    assert raw["confidence"].between(0, 1).all()
    np.testing.assert_allclose(found["confidence"], Calibration(0.5, 2.0, 1.0)(raw["confidence"]))
    assert read(calibrated, images, decoder="greedy")["error"].isna().all()


def test_lexicon_and_word_model_come_with_the_model(tmp_path, network, images):
    decoding = DecodingConfig(alpha=0.1, beta=3.0, lexicon="strict", hot_words={"cab": 1.0})
    words = WordNGram.train(["a cab", "dead cab"])
    found = read(reader(tmp_path, network, decoding, language_model=words, words="dead\na\n"), images)
    written = set(" ".join(found["text"]).split())
    assert written
    assert written <= {"dead", "a", "cab"}


def test_the_column_of_images_is_taken_by_its_name_or_as_the_only_one(tmp_path, network, images):
    loaded = reader(tmp_path, network, DecodingConfig(decoder="greedy"))
    texts = read(loaded, images)["text"].tolist()
    for frame in (pd.DataFrame({"id": [1, 2, 3], "image": images}), pd.DataFrame({"scan": images})):
        assert loaded.predict(None, frame)["text"].tolist() == texts
    doubled = pd.DataFrame([["a", "b"]], columns=["image", "image"])
    with pytest.raises(MlflowException, match="There are several columns image: expected one"):
        loaded.predict(None, doubled)
    with pytest.raises(MlflowException, match=r"The columns are id, scan: expected a column image"):
        loaded.predict(None, pd.DataFrame({"id": [1, 2, 3], "scan": images}))


def test_one_image_is_one_line_and_what_is_none_is_said(tmp_path, network, images):
    loaded = reader(tmp_path, network, DecodingConfig(decoder="greedy"))
    (tmp_path / "line.png").write_bytes(images[0])
    first = read(loaded, images[:1])
    array = np.asarray(Image.open(io.BytesIO(images[0])))
    for one in (images[0], str(tmp_path / "line.png"), tmp_path / "line.png", array, {"image": images[0]}):
        pd.testing.assert_frame_equal(loaded.predict(None, one), first)
    for nothing in (None, 5):
        assert "an image is given as a path, as bytes or as an array" in loaded.predict(None, nothing)["error"][0]
    with pytest.raises(MlflowException, match="not equally many values: image, x"):
        loaded.predict(None, {"image": images, "x": [1]})


def test_images_may_be_arrays_and_a_network_alone_reads_greedily(tmp_path, network, images):
    decoding = DecodingConfig(decoder="greedy", looks=3)
    whole = reader(tmp_path, network, decoding)
    arrays = [np.asarray(Image.open(io.BytesIO(image))) for image in images]
    pd.testing.assert_frame_equal(whole.predict(None, arrays), read(whole, images))
    wrong = whole.predict(None, [arrays[0].astype(np.float32), np.zeros((2, 3, 3), np.uint8)])
    assert wrong["error"].str.contains(r"must be \(height, width\) uint8, grey, got").all()
    (tmp_path / "provenance.json").write_text(
        '{"feature_settings": {"height_pixels": 32, "even_size": true}}', encoding="utf-8"
    )
    files = {name: tmp_path / f"{name}.json" for name in ("charset", "provenance")}
    alone = LineReader().load({"network": network, **files})
    pd.testing.assert_frame_equal(read(alone, images), read(whole, images))
    with pytest.raises(MlflowException, match=r"beam_lm.*without a language model"):
        read(alone, images, decoder="beam_lm")


def test_a_network_says_itself_how_high_its_lines_are(tmp_path, network):
    (tmp_path / "charset.json").write_text(CHARSET.to_json(), encoding="utf-8")
    files = {"network": network, "charset": tmp_path / "charset.json"}
    assert LineReader().load(files).image_config == ImageConfig(height_pixels=32)
    (tmp_path / "provenance.json").write_text('{"feature_settings": {"height_pixels": 48}}', encoding="utf-8")
    with pytest.raises(UserError, match=r"of lines 48 pixels high, and it takes lines of 32: .* do not belong"):
        LineReader().load(files | {"provenance": tmp_path / "provenance.json"})


def test_an_image_in_colour_is_not_taken_for_a_list_of_lines(tmp_path, network):
    loaded = reader(tmp_path, network, DecodingConfig(decoder="greedy"))
    with pytest.raises(MlflowException, match=r"\(64, 300, 3\) looks like one image in colour"):
        loaded.predict(None, np.zeros((64, 300, 3), np.uint8))
    assert len(loaded.predict(None, np.full((2, 40, 160), 255, np.uint8))) == 2
