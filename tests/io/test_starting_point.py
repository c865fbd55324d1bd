import json
import time
import zipfile

import fontpkg
import numpy as np
import pytest

from htr_pipeline.core.batching import Line
from htr_pipeline.core.config import UserError
from htr_pipeline.core.image import ImageConfig, normalise_line, pixel_settings, recorded_settings
from htr_pipeline.core.metrics import score_lines
from htr_pipeline.core.recipe import DecodingConfig, ModelConfig
from htr_pipeline.core.synthesis import Font, draw_style, render_line
from htr_pipeline.core.text import Charset
from htr_pipeline.io import starting_point
from htr_pipeline.io.starting_point import STARTER_FOLDER, StartingPoint, charset_hash, make_provenance, num_learnt

pytest.importorskip("keras")
from htr_pipeline.core.model import build_model, weights_hash


def saved(folder, charset, num_classes):
    build_model(ModelConfig(size="XS"), num_classes, 32, seed=1).save(folder / "model.keras")
    (folder / "charset.json").write_text(charset, encoding="utf-8")
    return StartingPoint.find(str(folder))


def test_network_and_charset_of_a_folder_are_read(tmp_path):
    start = saved(tmp_path, Charset("abc").to_json(), 4)
    assert start.charset() == Charset("abc")
    assert start.model().outputs[0].shape[-1] == 4
    before = start.content_hash()
    (tmp_path / "charset.json").write_text(Charset("abd").to_json(), encoding="utf-8")
    assert start.content_hash() != before


def test_the_same_weights_saved_again_are_the_same_network_to_start_from(tmp_path):
    start = saved(tmp_path, Charset("abc").to_json(), 4)
    provenance = make_provenance(weights_hash(start.model()), Charset("abc").to_json(), {}, [], None)
    (tmp_path / "provenance.json").write_text(json.dumps(provenance), encoding="utf-8")
    before, file = start.content_hash(), start.model_path.read_bytes()
    time.sleep(1.1)  # Keras writes the time into the file, in seconds
    saved(tmp_path, Charset("abc").to_json(), 4)
    assert start.model_path.read_bytes() != file
    assert start.content_hash() == before


def test_provenance_holds_the_lines_of_all_networks_before(tmp_path):
    start = saved(tmp_path, Charset("abc").to_json(), 4)
    assert start.provenance() == {}
    first = make_provenance("h", "{}", {}, ["1" * 64, "2" * 64], None)
    (tmp_path / "provenance.json").write_text(json.dumps(first | {"learnt_lines": None}), encoding="utf-8")
    assert start.provenance() == {}
    (tmp_path / "provenance.json").write_text(json.dumps(first), encoding="utf-8")
    second = make_provenance("i", "{}", {}, ["2" * 64, "3" * 64], start)
    assert second["start_from"] == str(tmp_path)
    assert num_learnt(second, [digit * 64 for digit in "1234"], []) == 3
    assert num_learnt(second, [digit * 64 for digit in "1234"], ["1" * 64]) == 2
    assert num_learnt({}, ["1" * 64], []) == 0
    with pytest.raises(UserError, match=r"provenance\.json is of another network than model\.keras"):
        start.model()
    (tmp_path / "provenance.json").write_text("no json", encoding="utf-8")
    assert start.provenance() == {}


def test_files_that_do_not_belong_together_are_named(tmp_path):
    with pytest.raises(UserError, match=r"model\.keras has 4 classes, and .*charset\.json makes 3"):
        saved(tmp_path, Charset("ab").to_json(), 4).model()


@pytest.mark.parametrize("charset", ["no json", json.dumps(["a"]), json.dumps({})])
def test_a_broken_charset_is_named(tmp_path, charset):
    with pytest.raises(UserError, match=r"charset\.json: this is no charset"):
        saved(tmp_path, charset, 4).charset()


# --- the starter model -----------------------------------------------------------------------------------------------


@pytest.fixture
def starter():
    return StartingPoint.find("starter")


def test_an_installation_without_a_starter_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(starting_point, "STARTER_FOLDER", tmp_path)
    with pytest.raises(UserError, match=r"'starter': This installation has no starter model in .*models:/htr@champion"):
        StartingPoint.find("starter")


def test_starter_is_the_model_of_the_package(tmp_path, monkeypatch):
    saved(tmp_path, Charset("abc").to_json(), 4)
    monkeypatch.setattr(starting_point, "STARTER_FOLDER", tmp_path)
    assert StartingPoint.find("starter").model_path == tmp_path / "model.keras"


def test_starter_is_small_and_holds_no_optimizer(starter):
    assert sum(path.stat().st_size for path in STARTER_FOLDER.iterdir()) <= 8_000_000
    with zipfile.ZipFile(starter.model_path) as file:
        assert set(file.namelist()) == {"metadata.json", "config.json", "model.weights.h5"}
        assert not json.loads(file.read("config.json"))["compile_config"]


def test_starter_comes_with_a_complete_card(starter):
    card = (STARTER_FOLDER / "README.md").read_text(encoding="utf-8")
    assert "{" not in card, "a placeholder of the model card is left"
    for credit in ("BAnQ", "Testaments de Poilus", "CC BY 4.0"):
        assert credit in card


def test_starter_reads_a_rendered_line_normalised_by_the_default_settings(starter):
    from htr_pipeline.core.inference import Network

    text, font = "la maison de ma mère est dans la rue", Font("kalam", (fontpkg.path("kalam", 400),))
    pixels, model = ImageConfig(), starter.model()
    provenance = starter.provenance()
    assert recorded_settings(provenance["feature_settings"]) == pixel_settings(pixels)
    assert provenance["charset_hash"] == charset_hash(starter.charset_path.read_text(encoding="utf-8"))
    assert provenance["model_hash"] == weights_hash(model)
    assert len(provenance["learnt_lines"]) == 3459 + 1822 + 2016
    assert model.inputs[0].shape[-1] == pixels.height_pixels
    lines = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        lines.append(Line(str(seed), normalise_line(render_line(text, draw_style(rng, font), rng), pixels).pixels, ""))
    network = Network(model, starter.charset())
    readings = network.decode(network.log_probs(lines), DecodingConfig(decoder="greedy"))
    assert score_lines([text] * 4, [reading.text for reading in readings]).cer < 0.2
