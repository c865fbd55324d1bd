import math

import pytest

from htr_pipeline.core.config import UserError
from htr_pipeline.core.recipe import DecodingConfig
from htr_pipeline.core.text import Charset

LETTERS = Charset.from_texts(["Paris la Verdun"])


@pytest.mark.parametrize("off", ["off", False])  # YAML reads a bare off as False
def test_lexicon_that_is_off_is_none_unless_there_are_hot_words(off):
    assert DecodingConfig(lexicon=off).build_lexicon(["Paris"], LETTERS) is None
    hot = DecodingConfig(lexicon=off, hot_words={"Verdun": 3}).build_lexicon(["Paris"], LETTERS)
    assert hot.score("Verdun, anything") == 3.0
    assert "Paris" not in hot


def test_strict_lexicon_forbids_and_open_lexicon_charges_for_unknown_words():
    words = ["Paris", "la"]
    strict = DecodingConfig(lexicon="strict").build_lexicon(words, LETTERS)
    charging = DecodingConfig(lexicon="open", unknown_word_price=2.5, hot_words={"la": 1.5}).build_lexicon(
        words, LETTERS
    )
    assert strict.score("la (Paris)") == 0.0
    assert strict.score("la Seine") == -math.inf
    assert charging.score("la Seine") == 1.5 - 2.5


def test_hot_words_are_normalised_as_the_texts_are():
    for hot_word in ("cafe\u0301", "caf\u00e9"):
        decoding = DecodingConfig(hot_words={hot_word: 3.0})
        assert decoding.build_lexicon([], Charset("acf\u00e9")).score("caf\u00e9") == 3.0
        assert decoding.build_lexicon([], Charset("acef\u0301")).score("cafe\u0301") == 3.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hot_words": {"New York": 2.0}}, r"decoding\.hot_words: 'New York' is no word .* one by one"),
        ({"hot_words": {"caf\u00e9": 1.0, "cafe\u0301": 5.0}}, r"decoding\.hot_words has a word twice"),
        ({"hot_words": {"1914": 2.0}}, r"decoding\.hot_words: '1914' is no word"),
        ({"hot_words": {1914: 2.0}}, r"decoding\.hot_words has 1914: 2\.0\. Expected a word and a number"),
        ({"hot_words": {"Verdun": "much"}}, r"decoding\.hot_words has 'Verdun': 'much'\. Expected"),
        ({"hot_words": {"Verdun": math.inf}}, r"decoding\.hot_words: hot word 'Verdun' has weight inf"),
        ({"hot_words": {"Verdun": 1, "Verdun,": 2}}, r"decoding\.hot_words: .* are looked up as one word"),
        ({"alpha": math.inf}, r"decoding\.alpha = inf: expected a finite number or null from 0\.0 to 100\.0"),
        ({"beta": math.nan}, r"decoding\.beta = nan: expected a finite number or null from -100\.0 to 100\.0"),
        ({"beam_width": 10**9}, r"decoding\.beam_width = 1000000000: expected a whole number from 1 to 10000"),
        ({"lexicon": "closed"}, r"decoding\.lexicon = 'closed': expected one of 'off', False, 'strict', 'open'"),
        ({"unknown_word_price": -1.0}, r"decoding\.unknown_word_price = -1\.0: expected a number of at least 0"),
    ],
)
def test_wrong_setting_is_named_before_anything_runs(settings, message):
    with pytest.raises(UserError, match=message):
        DecodingConfig(**settings)
