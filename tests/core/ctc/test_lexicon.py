import math
import random

import numpy as np
import pytest

from htr_pipeline.core.ctc.lexicon import Lexicon, bare_word, spelling_trie


def spelled(trie, classes):
    """Every word of a trie, with its number."""
    found = {}

    def visit(node, word):
        if trie["word"][node]:
            found[word] = int(trie["word"][node])
        children = range(trie["first_child"][node], trie["first_child"][node + 1])
        labels = [trie["token"][child] for child in children]
        assert labels == sorted(set(labels))
        for child, label in zip(children, labels, strict=True):
            visit(child, word + classes[label])

    visit(0, "")
    return found


class TestSpellingTrie:
    def test_holds_the_words_that_the_classes_can_spell(self):
        words = ["", "le", "la", "l", "été", "lé", "x"]
        classes = ("e", "", "l", "é", "t", " ")
        assert spelled(spelling_trie(words, classes), classes) == {"le": 1, "l": 3, "été": 4, "lé": 5}

    def test_nothing_to_spell(self):
        for words, classes in (([], ("a", "")), (["", "a"], ("",)), ([""], ("a", "")), (["", "b"], ("a", ""))):
            trie = spelling_trie(words, classes)
            assert trie["first_child"].tolist() == [1, 1]

    def test_random_words(self):
        generator = random.Random(0)
        for _ in range(30):
            words = ["", *{"".join(generator.choices("abc𝒜-", k=generator.randrange(1, 8))) for _ in range(40)}]
            classes = tuple(generator.sample(["a", "b", "c", "𝒜", "", "z"], 6))
            expected = {word: number for number, word in enumerate(words) if word and set(word) <= set(classes)}
            assert spelled(spelling_trie(words, classes), classes) == expected


class TestLexicon:
    @pytest.mark.parametrize(
        ("word", "bare"),
        [
            ("Paris,", "Paris"),
            ("(«l'eau»);", "l'eau"),
            ("peut-être", "peut-être"),
            ("1914.", ""),
            ("—", ""),
            ("3e", "e"),
            ("e\u0301te\u0301!", "e\u0301te\u0301"),
            ("", ""),
        ],
    )
    def test_words_are_looked_up_from_their_first_to_their_last_letter(self, word, bare):
        assert bare_word(word) == bare

    def test_score_counts_unknown_and_hot_words_and_forgives_numbers(self):
        lexicon = Lexicon(["à", "Paris,"], unknown_price=2.0, hot_words={"Dupont": 3.5})
        assert lexicon.score("à Paris, Dupont (Dupont) 1914 - xyz Xyz!") == 2 * 3.5 - 2 * 2.0
        assert lexicon.score("") == 0
        assert len(lexicon) == 3
        assert "(Paris)" in lexicon
        assert "paris" not in lexicon

    def test_strict_lexicon_forbids_texts_with_other_words(self):
        lexicon = Lexicon(["le", "mot"])
        assert lexicon.score("le mot") == 0
        assert lexicon.score("le mots") == -math.inf

    def test_binding_is_kept_for_the_next_call(self):
        lexicon = Lexicon(["ab"])
        bound = lexicon.for_classes(("a", "b", ""))
        assert lexicon.for_classes(("a", "b", "")) is bound
        assert len(lexicon.for_classes(("a", "")).trie) == 2

    def test_signs_within_a_word_lead_back_to_its_last_letter(self):
        classes = ("a", "'", "")
        trie, word_scores = Lexicon(["a'a"], hot_words={"a": 2.0}).for_classes(classes)
        assert trie["word"][:-1].tolist() == [0, 1, 1, 3]
        np.testing.assert_array_equal(word_scores, [-math.inf, 2.0, -math.inf, 0.0])

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="'New York' is no word of a lexicon"):
            Lexicon(["New York"])
        with pytest.raises(ValueError, match="'1914' is no word of a lexicon"):
            Lexicon(hot_words={"1914": 1.0})
        with pytest.raises(ValueError, match="words is one string"):
            Lexicon("mot")
        with pytest.raises(ValueError, match="Among the words there is b'mot': expected str"):
            Lexicon([b"mot"])
        with pytest.raises(ValueError, match="unknown_price = -1"):
            Lexicon(["mot"], unknown_price=-1)
        with pytest.raises(ValueError, match="unknown_price = nan"):
            Lexicon(["mot"], unknown_price=math.nan)
        with pytest.raises(ValueError, match="unknown_price = None"):
            Lexicon(["mot"], unknown_price=None)
        with pytest.raises(ValueError, match=r"hot_words is \['mot'\]: expected words with their nats"):
            Lexicon(hot_words=["mot"])
        with pytest.raises(ValueError, match="hot word 'mot' has weight None"):
            Lexicon(hot_words={"mot": None})
        with pytest.raises(ValueError, match="hot word 'mot' has weight inf"):
            Lexicon(hot_words={"mot": math.inf})
        with pytest.raises(ValueError, match="hot word 'mot' has weight -1e\\+300: expected nats from -1e\\+06 to 1e"):
            Lexicon(hot_words={"mot": -1e300})
        with pytest.raises(ValueError, match="'mot' and 'mot,' are looked up as one word"):
            Lexicon(hot_words={"mot": 1.0, "mot,": 2.0})
