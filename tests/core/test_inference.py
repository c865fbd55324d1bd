"""What decoders make of known log-probabilities, through the class that pipeline and server read with."""

import numpy as np
import pytest

from htr_pipeline.core.batching import Line
from htr_pipeline.core.calibration import Calibration
from htr_pipeline.core.ctc.decoding import beam_search, line_confidence
from htr_pipeline.core.ctc.language_model import CharacterNGram, WordNGram
from htr_pipeline.core.image import num_frames
from htr_pipeline.core.recipe import DecodingConfig, ModelConfig
from htr_pipeline.core.text import Charset, visual_text

pytest.importorskip("keras")

from htr_pipeline.core import inference
from htr_pipeline.core.inference import Network
from htr_pipeline.core.model import build_model

CHARSET = Charset(" adeno")
BEAM_LM = DecodingConfig(decoder="beam_lm", alpha=0.5, beta=0.5)


@pytest.fixture(scope="module")
def model():
    return build_model(ModelConfig(size="XS"), CHARSET.num_classes, 32, seed=1)


@pytest.fixture(scope="module")
def language_model():
    return CharacterNGram.train(["one dean", "a node", "no end", "done"], order=3)


def log_probs_of(text, certainty=0.9, other="a"):
    """A frame for each character and a blank after it; what a character is not sure of goes to another one."""
    frames = []
    for character in text:
        probabilities = np.full(CHARSET.num_classes, 1e-3)
        probabilities[CHARSET.encode(other)[0]] += 1 - certainty
        probabilities[CHARSET.encode(character)[0]] += certainty
        blank = np.full(CHARSET.num_classes, 1e-3)
        blank[CHARSET.blank_index] = 1.0
        frames += [probabilities / probabilities.sum(), blank / blank.sum()]
    return np.log(np.array(frames, np.float32))


def test_a_lines_confidence_is_that_of_its_characters_unless_a_language_model_decides(model, language_model):
    network, lines = Network(model, CHARSET), [log_probs_of("one node", 0.7)]
    for decoder in ("greedy", "beam"):
        (reading,) = network.decode(lines, DecodingConfig(decoder=decoder))
        assert reading.text == "one node"
        assert reading.confidence == pytest.approx(np.prod([c[3] for c in reading.characters]) ** (1 / 8), rel=1e-9)
    (reading,) = network.decode(lines, BEAM_LM, language_model)
    (hypotheses,) = beam_search(
        lines[0][None],
        beam_width=BEAM_LM.beam_width,
        top_paths=10,
        characters=CHARSET.characters,
        language_model=language_model,
        alpha=0.5,
        beta=0.5,
    )
    scores = np.exp([hypothesis.score for hypothesis in hypotheses])
    assert reading.confidence == pytest.approx(line_confidence(hypotheses[0]) * scores[0] / scores.sum(), rel=1e-6)


def test_calibration_of_the_decoder_is_applied_to_lines_and_characters(model, language_model):
    lines = [log_probs_of("a node", 0.8)]
    of_lines, of_characters = Calibration(2.0, 1.0, -1.0), Calibration(0.5, 1.5, 1.0)
    calibrated = Network(model, CHARSET, {"beam_lm": {"lines": of_lines, "characters": of_characters}})
    for setting in (BEAM_LM, DecodingConfig(decoder="greedy")):
        (raw,) = Network(model, CHARSET).decode(lines, setting, language_model)
        (reading,) = calibrated.decode(lines, setting, language_model)
        assert (reading.text, [c[:3] for c in reading.characters]) == (raw.text, [c[:3] for c in raw.characters])
        values = np.array([character[3] for character in raw.characters])
        if setting is BEAM_LM:
            assert reading.confidence == pytest.approx(of_lines([raw.confidence])[0])
            np.testing.assert_allclose([c[3] for c in reading.characters], of_characters(values))
        else:
            assert reading == raw


def test_lexicon_and_hot_words_are_those_of_beam_lm_alone(model, language_model):
    network, lines = Network(model, CHARSET), [log_probs_of("one nade", 0.55, "o")]
    strict = DecodingConfig(lexicon="strict", alpha=0.5, beta=0.5)
    lexicon = strict.build_lexicon(["one", "node"], CHARSET)
    assert network.decode(lines, strict, language_model, lexicon)[0].text == "one node"
    greedy = DecodingConfig(decoder="greedy", lexicon="strict")
    assert network.decode(lines, greedy, language_model, lexicon)[0].text == "one nade"
    hot = DecodingConfig(lexicon="off", alpha=0.0, beta=0.0, hot_words={"node": 4.0})
    assert network.decode(lines, hot, language_model, hot.build_lexicon([], CHARSET))[0].text == "one node"


def test_word_models_read_too(model):
    words = WordNGram.train(["one node", "one node done"])
    line = np.concatenate([log_probs_of("one n"), log_probs_of("a", 0.55, "o"), log_probs_of("de")])
    setting = DecodingConfig(alpha=1.0, beta=0.0)
    assert Network(model, CHARSET).decode([line], setting, words)[0].text == "one node"


def test_lines_without_frames_or_without_text_are_read_as_empty(model, language_model):
    blank = np.full((6, CHARSET.num_classes), 1e-4, np.float32)
    blank[:, CHARSET.blank_index] = 1.0
    lines = [np.log(blank / blank.sum(axis=1, keepdims=True)), np.zeros((0, CHARSET.num_classes), np.float32)]
    for decoder in ("greedy", "beam", "beam_lm"):
        setting = DecodingConfig(decoder=decoder, alpha=0.5, beta=0.0)
        for reading in Network(model, CHARSET).decode(lines, setting, language_model):
            assert (reading.text, reading.characters) == ("", [])
            assert 0 <= reading.confidence <= 1


def test_blanks_at_the_ends_and_beside_others_are_left_out_with_their_frames(model, language_model):
    line = log_probs_of(" one  node ")
    for decoder in ("greedy", "beam"):
        reading = Network(model, CHARSET).decode([line], DecodingConfig(decoder=decoder), language_model)[0]
        assert reading.text == "one node" == "".join(character for character, *_ in reading.characters)
        assert [first for _, first, _, _ in reading.characters] == [2, 4, 6, 8, 12, 14, 16, 18]


def test_lines_are_decoded_in_groups_that_memory_can_hold(model, language_model, monkeypatch):
    texts = ["one", "a node", "dean", "no", "a dean and no end", "do", "one"]
    lines = [log_probs_of(text) for text in texts]
    network, sizes = Network(model, CHARSET), []
    monkeypatch.setattr(inference, "_MOST_NUMBERS", 2 * lines[1].size)
    decode = network._decode
    monkeypatch.setattr(network, "_decode", lambda lines, *rest: sizes.append(len(lines)) or decode(lines, *rest))
    readings = network.decode(lines, DecodingConfig(decoder="greedy"), language_model)
    assert [reading.text for reading in readings] == texts
    assert sizes == [2, 2, 1, 2]


def test_three_looks_are_the_mean_of_a_line_as_it_is_and_moved_by_a_sixteenth(model):
    network, rng = Network(model, CHARSET), np.random.default_rng(1)
    lines = [Line(str(width), rng.integers(0, 256, (width, 32), np.uint8), "") for width in (40, 90, 61)]

    def moved(line, rows):
        taller = np.pad(line.pixels, ((0, 0), (2, 2)))
        return line._replace(pixels=np.ascontiguousarray(taller[:, 2 - rows : 34 - rows]))

    once = [network.log_probs([moved(line, rows) for line in lines]) for rows in (0, -2, 2)]
    for index, found in enumerate(network.log_probs(lines, looks=3)):
        mean = np.mean([log_probs[index] for log_probs in once], axis=0)
        np.testing.assert_allclose(found, mean - np.log(np.exp(mean).sum(axis=1, keepdims=True)), atol=1e-5)
        assert len(found) == num_frames(lines[index].pixels.shape[0])


def test_text_from_right_to_left_is_read_in_the_order_in_which_it_is_typed(model):
    charset = Charset(" אבגד1")
    right_to_left = "אב 11 גד"  # of seven classes, as the other charset
    labels = charset.encode(right_to_left)
    frames = np.full((2 * len(labels), charset.num_classes), 1e-3)
    frames[np.arange(0, len(frames), 2), labels] = np.linspace(0.5, 0.9, len(labels))  # surer and surer to the right
    frames[np.arange(1, len(frames), 2), charset.blank_index] = 1.0
    log_probs = np.log(frames / frames.sum(axis=1, keepdims=True)).astype(np.float32)
    known = CharacterNGram.train([visual_text(right_to_left)], order=3)
    for decoding in (DecodingConfig(decoder="greedy"), DecodingConfig(decoder="beam"), BEAM_LM):
        lexicon = decoding.build_lexicon(["אב", "גד"], charset)
        (reading,) = Network(model, charset).decode([log_probs], decoding, known, lexicon)
        assert reading.text == right_to_left
        assert [character for character, *_ in reading.characters] == list(right_to_left)
        starts = [start for _, start, _, _ in reading.characters]
        assert starts == [14, 12, 10, 6, 8, 4, 2, 0]  # the number runs to the right
        assert reading.characters[0][3] == max(confidence for *_, confidence in reading.characters)


def test_words_from_right_to_left_are_known_and_wanted_in_visual_order():
    decoding = DecodingConfig(decoder="beam_lm", unknown_word_price=2.0, hot_words={"גד": 3.0})
    lexicon = decoding.build_lexicon(["אב"], Charset(" אבגד1"))
    assert lexicon.score(visual_text("אב גד 11")) == 3.0
    assert lexicon.score("אב גד 11") == -4.0
