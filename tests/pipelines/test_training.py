"""Charset, language model and lexicon as the training pipeline makes them; the network: tests/core and test_run."""

import json
import math
import re

import pyarrow as pa
import pytest

from htr_pipeline.core.augmentation import AugmentationConfig
from htr_pipeline.core.config import UserError
from htr_pipeline.core.ctc.language_model import CharacterNGram, WordNGram
from htr_pipeline.core.image import ImageConfig, pixel_settings
from htr_pipeline.core.recipe import DecodingConfig, LanguageModelConfig, ModelConfig, TrainingConfig
from htr_pipeline.core.text import Charset, visual_text
from htr_pipeline.io.datasets import LanguageModel
from htr_pipeline.io.starting_point import StartingPoint
from htr_pipeline.io.tracking import little_patience
from htr_pipeline.pipelines.training.nodes import (
    CheckpointConfig,
    _settings_of_weights,
    _TrainingProgress,
    _warn_of_not_reading,
    build_network,
    collect_charset,
    collect_words,
    draw_learning_curves,
    train_language_model,
)

TRAINING = ["the road to Verdun", "the (old) road, 1916"]


class Texts:
    """The part of the features that these nodes read."""

    def figures(self):
        return pa.table({"split": ["train", "train", "test"], "text": [*TRAINING, "secret"]})

    def data_hash(self):
        return "0f" * 32


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, CharacterNGram.train(TRAINING, 6)),
        ({"order": 3}, CharacterNGram.train(TRAINING, 3)),
        ({"kind": "word"}, WordNGram.train(TRAINING, 3)),
        ({"kind": "word", "order": 2}, WordNGram.train(TRAINING, 2)),
    ],
)
def test_model_of_the_training_texts_survives_the_catalog(tmp_path, settings, expected):
    dataset = LanguageModel(str(tmp_path / "model.npz"))
    dataset.save(train_language_model(Texts(), LanguageModelConfig(**settings)))
    loaded = dataset.load()
    assert type(loaded) is type(expected)
    assert loaded.trie.tobytes() == expected.trie.tobytes()


def test_folder_of_texts_is_learnt_from_and_its_words_are_known(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("\ufeffa  forest\n\n«forest»\n", encoding="utf-8")
    settings = LanguageModelConfig(texts=str(tmp_path))
    assert train_language_model(Texts(), settings).trie.tobytes() == (
        CharacterNGram.train([*TRAINING, "a forest", "«forest»"]).trie.tobytes()
    )
    assert collect_words(Texts(), settings, DecodingConfig()) == "Verdun\na\nforest\nold\nroad\nthe\nto\n"


def test_arpa_file_of_characters_may_write_blanks_in_its_own_way(tmp_path, caplog):
    file = tmp_path / "other.arpa"
    CharacterNGram.train(TRAINING, 2).to_arpa(file, space_token="|")
    assert " " in train_language_model(Texts(), LanguageModelConfig(arpa=str(file), space_token="|")).vocabulary
    assert "space_token" not in caplog.text
    train_language_model(Texts(), LanguageModelConfig(arpa=str(file)))
    assert "has no '<space>', so the model knows no blanks" in caplog.text


def test_arpa_file_is_taken_instead_of_training(tmp_path):
    other = WordNGram.train(["quite another text"], 2)
    other.to_arpa(tmp_path / "other.arpa")
    found = train_language_model(Texts(), LanguageModelConfig(kind="word", arpa=str(tmp_path / "other.arpa")))
    assert found.score("quite another") == pytest.approx(other.score("quite another"), rel=1e-5)


def test_words_of_an_arpa_file_are_known_beside_those_of_the_texts(tmp_path):
    WordNGram.train(["a quite green forest,"], 2).to_arpa(tmp_path / "other.arpa")
    settings = LanguageModelConfig(kind="word", arpa=str(tmp_path / "other.arpa"))
    model = train_language_model(Texts(), settings)
    words = collect_words(Texts(), settings, DecodingConfig(), model).split()
    assert words == ["Verdun", "a", "forest", "green", "old", "quite", "road", "the", "to"]


def test_what_an_arpa_file_does_not_know_is_said(tmp_path, caplog):
    CharacterNGram.train(["the old road"], 2).to_arpa(tmp_path / "characters.arpa")
    train_language_model(Texts(), LanguageModelConfig(arpa=str(tmp_path / "characters.arpa")))
    assert "does not know 9 of the characters of the training texts: ( ) , 1 6 9 V n u. beam_lm will" in caplog.text
    WordNGram.train(["quite another text"], 2).to_arpa(tmp_path / "words.arpa")
    train_language_model(Texts(), LanguageModelConfig(kind="word", arpa=str(tmp_path / "words.arpa")))
    assert "does not know 7 of the 7 words of the training texts, such as (old), 1916" in caplog.text


def test_an_order_beside_a_file_is_refused():
    with pytest.raises(UserError, match=r"language_model\.order = 3 beside language_model\.arpa"):
        LanguageModelConfig(arpa="some.arpa", order=3)


@pytest.mark.parametrize(
    ("verdict", "cer", "words"),
    [
        ("exploded", 0.99, "last judged as exploded. Lower training.learning_rate to a tenth"),
        ("blank", math.nan, "last judged as blank. Run `kedro check-batch`"),
        ("plateau", 0.95, "does not read yet. It made 700 steps"),
        ("by_heart", 0.2, "reads its training lines better (CER 20 %) than others"),
    ],
)
def test_a_network_that_does_not_read_comes_with_the_advice_for_what_was_seen(caplog, verdict, cer, words):
    _warn_of_not_reading({"verdict": verdict, "train_cer": cer, "step": 700}, TrainingConfig())
    assert words in caplog.text
    assert "learning_rate is" not in caplog.text


def test_a_rate_far_from_the_default_is_said_of_a_network_that_does_not_read_yet(caplog):
    _warn_of_not_reading({"verdict": "plateau", "train_cer": 0.99, "step": 42}, TrainingConfig(learning_rate=0.6))
    assert caplog.text.strip().endswith("training.learning_rate is 0.6; the default is 0.006.")


def test_file_of_words_is_taken_instead_of_the_texts(tmp_path):
    (tmp_path / "words.txt").write_text("Paris,\n\nSeine Paris\n1914\ne\u0301te\u0301\n", encoding="utf-8")
    decoding = DecodingConfig(lexicon="strict", lexicon_words=str(tmp_path / "words.txt"))
    assert collect_words(Texts(), LanguageModelConfig(), decoding) == "Paris\nSeine\nété\n"


def test_files_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    (tmp_path / "numbers.txt").write_text("1914 1918", encoding="utf-8")
    for arpa, message in (("nowhere.arpa", "No such file"), ("numbers.txt", r"line 1")):
        with pytest.raises(UserError, match=rf"language_model\.arpa: .*{message}"):
            train_language_model(Texts(), LanguageModelConfig(arpa=str(tmp_path / arpa)))
    for texts, message in (("nothing", "expected a folder with .txt files"), (".", "latin.txt: this is not UTF-8")):
        with pytest.raises(UserError, match=message):
            train_language_model(Texts(), LanguageModelConfig(texts=str(tmp_path / texts)))
    for words, message in (
        ("nowhere.txt", "nowhere.txt: cannot be read: No such file"),
        ("latin.txt", "latin.txt: this is not UTF-8"),
        ("numbers.txt", r"decoding\.lexicon_words = .*numbers\.txt'.*no word"),
    ):
        with pytest.raises(UserError, match=message):
            collect_words(Texts(), LanguageModelConfig(), DecodingConfig(lexicon_words=str(tmp_path / words)))


@pytest.fixture
def start(tmp_path):
    """Where a network that knows the characters z, T and some others was left."""
    (tmp_path / "model.keras").write_bytes(b"")
    (tmp_path / "charset.json").write_text(Charset("zTahe ord").to_json(), encoding="utf-8")
    return str(tmp_path)


def characters(**settings):
    return "".join(
        Charset.from_json(collect_charset(Texts(), TrainingConfig(**settings), CheckpointConfig())).characters
    )


def test_charset_is_that_of_the_training_texts():
    assert characters() == "".join(sorted(set("".join(TRAINING))))


def test_charset_of_the_network_to_start_from_is_extended_or_replaced(start):
    assert characters(start_from=start) == "zTahe ord" + "".join(sorted(set("".join(TRAINING)) - set("zTahe ord")))
    assert characters(start_from=start, start_charset="new") == characters()


def test_new_characters_are_refused_where_none_may_come(start):
    with pytest.raises(UserError, match=r"training\.start_charset is fail.*does not know: '\(\),1"):
        characters(start_from=start, start_charset="fail")


def test_the_folder_that_training_writes_to_is_no_start():
    for path in (CheckpointConfig().path, "elsewhere/checkpoint.npz"):
        with pytest.raises(UserError, match="is the folder that this training writes to"):
            collect_charset(Texts(), TrainingConfig(start_from="data/06_models"), CheckpointConfig(path=path))


def test_a_registry_that_does_not_answer_is_named_without_its_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:S3cret@127.0.0.1:9")
    with (
        pytest.raises(UserError, match=r"^training\.start_from = 'models:/htr@champion': MLflow: ") as error,
        little_patience(),
    ):
        characters(start_from="models:/htr@champion")
    assert "S3cret" not in str(error.value)


@pytest.mark.parametrize("place", ["nowhere", "models:/nothing@champion"])
def test_a_start_that_is_not_there_is_named(tmp_path, monkeypatch, place):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(UserError, match=rf"training\.start_from = '{place}'"):
        characters(start_from=place)


def test_a_start_from_lines_made_in_another_way_is_warned_of(tmp_path, caplog):
    pytest.importorskip("keras")
    made = pixel_settings(ImageConfig(height_pixels=32))
    stats = {
        "height_pixels": 32,
        "width_pixels": {"median": 300},
    }
    charset, small = Charset("ab"), ModelConfig(size="XS")
    build_network(small, TrainingConfig(), charset, stats, made, None).save(tmp_path / "model.keras")
    (tmp_path / "charset.json").write_text(charset.to_json(), encoding="utf-8")
    training, start = TrainingConfig(start_from=str(tmp_path)), StartingPoint.find(str(tmp_path))
    build_network(small, training, charset, stats, made, start)
    assert "other settings of features" not in caplog.text
    higher = stats | {"height_pixels": 48}
    build_network(small, training, charset, higher, made | {"height_pixels": 48}, start)
    assert "trained on lines that were made with other settings of features (height_pixels = 32, here 48" in caplog.text
    leaning = made | {"deslant": False, "opencv": "1.0"}
    (tmp_path / "provenance.json").write_text(json.dumps({"feature_settings": leaning}), encoding="utf-8")
    build_network(small, training, charset, stats, made, start)
    assert "(deslant = False, here True): it knows strokes" in caplog.text
    del leaning["deslant"], leaning["even_size"]
    (tmp_path / "provenance.json").write_text(json.dumps({"feature_settings": leaning}), encoding="utf-8")
    build_network(small, training, charset, stats, made, start)
    assert "(even_size = False, here True)" in caplog.text, "a record that is older than this setting"


def test_a_network_has_the_size_of_the_one_that_it_starts_from(tmp_path, caplog):
    pytest.importorskip("keras")
    caplog.set_level("INFO")
    stats, charset = {"height_pixels": 32, "width_pixels": {"median": 300}}, Charset("ab")

    def built(size, training, start=None):
        return build_network(ModelConfig(size=size), training, charset, stats, {}, start)

    built("XS", TrainingConfig()).save(tmp_path / "model.keras")
    (tmp_path / "charset.json").write_text(charset.to_json(), encoding="utf-8")
    training, start = TrainingConfig(start_from=str(tmp_path)), StartingPoint.find(str(tmp_path))
    assert built(None, training, start).count_params() == built("XS", training, start).count_params()
    assert [record.args[0] for record in caplog.records if record.msg.startswith("Network %s")] == ["XS"] * 3
    with pytest.raises(UserError, match=r"model\.size = 'S': '.*' is of size XS.*Set model\.size=null, or start from"):
        built("S", training, start)
    built(None, TrainingConfig())
    assert caplog.records[-1].args[0] == "SM"


def test_the_default_size_is_the_same_training_as_that_size():
    def settings(size):
        blocks = ModelConfig(size=size), AugmentationConfig(), TrainingConfig()
        return _settings_of_weights("d", "{}", *blocks, None)

    assert settings(None) == settings("SM") != settings("M")


@pytest.mark.parametrize("num_epochs", [1, 40])
def test_learning_curves_are_a_picture_of_the_history_and_the_same_each_time(num_epochs):
    columns = ["train_loss", "validation_loss", "train_cer", "validation_cer", "learning_rate"]
    epochs = list(range(1, num_epochs + 1))
    history = pa.table({"epoch": epochs} | {name: [1.0 / epoch for epoch in epochs] for name in columns})
    picture = draw_learning_curves(history)
    assert picture.startswith("<?xml")
    assert f"CER, lowest on validation {1 / num_epochs:.2%}" in picture
    assert {name.replace("_", " ") for name in columns} <= set(re.findall(r">([^<]+)</text>", picture))
    assert draw_learning_curves(history) == picture


def test_a_new_mlflow_run_gets_the_epochs_that_an_earlier_one_has(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    history = [
        {"epoch": epoch, "step": 4 * epoch, "validation_cer": 1.0 / epoch, "verdict": "learning"} for epoch in (1, 2, 3)
    ]
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        mlflow.set_experiment(experiment_id=mlflow.create_experiment("t", (tmp_path / "artifacts").as_uri()))
        with mlflow.start_run() as run, _TrainingProgress(is_chief=True) as progress:
            progress.epoch(
                history[2] | {"train_loss": 1.0, "validation_loss": 1.0, "train_cer": 0.5, "lines_per_second": 9.0},
                [("abc", "ab")],
            )
            progress.complete(history)
            progress.complete(history)
        found = mlflow.MlflowClient().get_metric_history(run.info.run_id, "validation_cer")
        assert sorted((metric.step, metric.value) for metric in found) == [(4, 1.0), (8, 0.5), (12, 1.0 / 3)]
    finally:
        mlflow.set_tracking_uri(before)


def test_language_models_are_of_texts_in_visual_order_and_the_lexicon_of_words_as_they_are_typed(tmp_path, caplog):
    class RightToLeft:
        def figures(self):
            return pa.table({"split": ["train"], "text": ["אבג דה 1914"]})

    model = train_language_model(RightToLeft(), LanguageModelConfig(order=3))
    assert model.score(visual_text("אבג דה 1914")) > model.score("אבג דה 1914") + 3
    assert collect_words(RightToLeft(), LanguageModelConfig(), DecodingConfig()) == "אבג\nדה\n"
    model.to_arpa(tmp_path / "model.arpa")
    train_language_model(RightToLeft(), LanguageModelConfig(arpa=str(tmp_path / "model.arpa")))
    assert "has to be such a one" in caplog.text
