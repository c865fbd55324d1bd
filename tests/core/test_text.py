import random
import unicodedata

import numpy as np
import pytest

from htr_pipeline.core.config import UserError
from htr_pipeline.core.text import (
    UNICODE_FORMS,
    Charset,
    normalise_text,
    required_frames,
    unicode_form_of,
    visual_order,
    visual_text,
)


class TestNormaliseText:
    def test_white_space_of_every_kind_becomes_one_blank_and_ends_are_trimmed(self):
        assert normalise_text("\t the \u00a0 quick\u2003\nfox ") == "the quick fox"
        assert normalise_text(" \n") == ""

    def test_decomposed_and_composed_letters_become_one(self):
        assert normalise_text("e\u0301") == normalise_text("é") == "é"
        assert normalise_text("é", "NFD") == "e\u0301"

    def test_compatibility_forms_change_only_when_asked(self):
        assert normalise_text("ﬁn½") == "ﬁn½"
        assert normalise_text("ﬁn", "NFKC") == "fin"

    @pytest.mark.parametrize("form", UNICODE_FORMS)
    def test_twice_is_the_same_as_once(self, form):
        once = normalise_text("  Å ﬁ  ḗ \u1e9b\u0323 ", form)
        assert normalise_text(once, form) == once
        assert unicodedata.is_normalized(form, once)


@pytest.mark.parametrize("form", UNICODE_FORMS)
def test_other_texts_are_brought_to_the_form_of_the_transcriptions(form):
    text = normalise_text("ﬁn été", form)
    charset = Charset.from_texts([text])
    assert {charset.normalised(normalise_text("ﬁn  été", other)) for other in ("NFC", "NFD")} == {text}
    assert unicode_form_of([text, "abc"]) == form.replace("K", ""), "the first that fits"


def test_texts_of_no_form_at_all_are_mixed():
    assert unicode_form_of(["é", "e\u0301"]) == "mixed"
    assert Charset("abc").normalised(" u\u0308 ") == "ü", "the usual form where none is better"


@pytest.mark.parametrize(("text", "frames"), [("", 0), ("a", 1), ("ab", 2), ("aa", 3), ("aaa", 5), ("all  ok", 9)])
def test_equal_neighbours_need_one_more_frame(text, frames):
    assert required_frames(text) == frames


class TestCharset:
    def test_classes_are_code_point_order_and_the_blank_is_last(self):
        charset = Charset.from_texts(["ba", "é b", ""])
        assert charset.characters == (" ", "a", "b", "é")
        assert (len(charset), charset.blank_index, charset.num_classes) == (4, 4, 5)

    def test_charset_does_not_depend_on_the_order_of_the_texts(self):
        texts = ["one", "two", "three"]
        assert Charset.from_texts(texts) == Charset.from_texts(reversed(texts))
        assert hash(Charset.from_texts(texts)) == hash(Charset.from_texts(reversed(texts)))

    def test_decode_undoes_encode(self):
        charset = Charset.from_texts(["Où est l'été ?"])
        labels = charset.encode("tôt été"[4:])
        assert labels.dtype == np.int32
        assert charset.decode(labels) == "été"
        assert charset.encode("").shape == (0,)

    @pytest.mark.parametrize("label", [-1, 3])  # what pads labels; the blank
    def test_decode_refuses_what_is_no_character(self, label):
        with pytest.raises(UserError, match=rf"Labels \[{label}\] stand for no character .* of 3: expected 0 to 2"):
            Charset("abc").decode(np.array([0, label, 2]))

    def test_no_texts_give_an_empty_charset_with_the_blank_alone(self):
        assert Charset.from_texts([]).num_classes == 1

    def test_json_gives_the_charset_back(self):
        charset = Charset('ba"\\\u2028é😀')
        again = Charset.from_json(charset.to_json())
        assert again == charset
        assert again.characters == charset.characters
        assert "é" in charset.to_json()

    def test_unknown_characters_are_named_once_in_order(self):
        charset = Charset("abc")
        assert charset.unknown("zebra zoo") == " eorz"
        assert "a" in charset
        assert "z" not in charset
        with pytest.raises(UserError, match="'zab' has characters that the charset of 3 lacks: 'z'"):
            charset.encode("zab")

    @pytest.mark.parametrize("characters", [["a", "b", "a"], ["ab"], [""]])
    def test_characters_must_be_single_and_distinct(self, characters):
        with pytest.raises(UserError, match="distinct single characters"):
            Charset(characters)

    def test_charsets_with_another_order_differ(self):
        assert Charset("ab") != Charset("ba")
        assert Charset("ab") != "ab"


def test_an_extended_charset_keeps_every_class():
    assert Charset("ba").extended(["abc", "cd"]).characters == ("b", "a", "c", "d")


HEBREW = list("אבגדהוזח")


class TestVisualOrder:
    # Text as it is typed, and what stands on the line from left to right. Both as lists of pieces, since editors show
    # text in two directions each in their own way.
    @pytest.mark.parametrize(
        ("text", "line"),
        [
            (["A word, and 12."], ["A word, and 12."]),
            (["1914-1918"], ["1914-1918"]),
            (["א", "ב", " ", "ג"], ["ג", " ", "ב", "א"]),
            (["א", " ", "1914-1918", ".", "ב"], ["ב", ".", "1914-1918", " ", "א"]),
            (["ا", " ", "١٢/٥/١٩٢٠", " ", "ب"], ["ب", " ", "١٢/٥/١٩٢٠", " ", "ا"]),
            (["ا", " ", "١٩١٤", "-", "١٩١٨"], ["١٩١٨", "-", "١٩١٤", " ", "ا"]),
            (
                ["א", "ב", "ג", " ", "of 2", " ", "12", " ", "34"],
                ["34", " ", "12", " ", "2", " ", "of", " ", "ג", "ב", "א"],
            ),
            (["א", "ב", "ג", "ד", " ", "AB c", " ", "ה"], ["ה", " ", "AB c", " ", "ד", "ג", "ב", "א"]),
            (
                ["Hello ", "א", "ב", " ", "12", " ", "ג", ", world."],
                ["Hello ", "ג", " ", "12", " ", "ב", "א", ", world."],
            ),
            ([*HEBREW, " ", "COVID-19"], ["COVID-19", " ", *HEBREW[::-1]]),
            ([*HEBREW, " ", "A4", ", ", "3D"], ["A4", ", ", "3D", " ", *HEBREW[::-1]]),
            (
                [*HEBREW, " ", "25%", " ", "₪100", " ", "37.5°C"],
                ["37.5°C", " ", "₪100", " ", "25%", " ", *HEBREW[::-1]],
            ),
            ([*HEBREW, " ", "12", " ", "page 3 of", " ", "4"], ["4", " ", "page 3 of", " ", "12", " ", *HEBREW[::-1]]),
            (["ا", " ", "۳٬۵۰۰", " ", "۱۲٫۵"], ["۱۲٫۵", " ", "۳٬۵۰۰", " ", "ا"]),
            ([*HEBREW, " ", "12–15", " ", "3=4"], ["4=3", " ", "15–12", " ", *HEBREW[::-1]]),
            (["ا", " ", "1948", "-", "1950"], ["1950", "-", "1948", " ", "ا"]),
            (["ا", "ب", " ", "٢٥", "٪"], ["٪", "٢٥", " ", "ب", "ا"]),  # read on from the number
            (["ש", "\u05b0", "ל"], ["ל", "\u05b0", "ש"]),
            ([], []),
        ],
    )
    def test_lines_are_learnt_as_they_stand_and_read_as_they_are_typed(self, text, line):
        text, line = "".join(text), "".join(line)
        assert visual_text(text) == line
        assert visual_text(line) == text

    def test_it_undoes_itself_whatever_the_text(self):
        rng = random.Random(1)
        alphabets = "אבגدرسaéb 12٣./:,-()%!\u05b0\u0651\u0301\u00a0", "אa1% -.", "اa1٣%٫ -.", "אa1٣$ ,"
        for alphabet in (alphabet for alphabet in alphabets for _ in range(5_000)):
            text = "".join(rng.choices(alphabet, k=rng.randint(0, 14)))
            order = visual_order(text)
            assert sorted(order) == list(range(len(text)))
            assert visual_text(visual_text(text)) == text
            assert visual_text(text) == "".join(text[place] for place in order)

    def test_classes_stand_from_left_to_right_and_give_the_text_back(self):
        charset = Charset("אבג 12")
        labels = charset.encode("אב 12")
        assert labels.tolist() == [4, 5, 3, 1, 0]
        assert charset.decode(labels) == "אב 12"

    def test_neighbours_are_those_on_the_line(self):
        assert required_frames("א1 1ב") == 5
        assert required_frames("אא1") == 4
