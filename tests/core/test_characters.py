import pytest

from htr_pipeline.core.characters import describe_characters, is_debris, is_invisible, look_alike_words, plain_form


@pytest.mark.parametrize("character", ["\x07", "\ue000", "\U000f0001", "\ufffd", "\x85"])
def test_control_private_use_and_replacement_characters_are_debris(character):
    assert is_debris(character)


@pytest.mark.parametrize("character", ["\u00ad", "\u200b", "\u200e", "\ufeff", "\uffff"])
def test_what_leaves_nothing_on_paper_is_invisible(character):
    assert is_invisible(character)


def test_ordinary_characters_of_any_script_are_neither():
    text = "Æther, ﬁn — “שלום” 漢字 e\u0301 می\u200cخواهم"
    assert not any(is_debris(c) or is_invisible(c) for c in text)


@pytest.mark.parametrize(
    ("character", "plain"),
    [("ﬁ", "fi"), ("Ａ", "A"), ("…", "..."), ("’", "'"), ("‑", "-"), ("𝐚", "a"), ("ﻻ", "لا"), ("ĳ", "ij")],
)
def test_forms_of_one_sign_have_one_plain_form(character, plain):
    assert plain_form(character) == plain


@pytest.mark.parametrize("character", "aé'-²½①ſ´漢–„")
def test_signs_of_their_own_have_no_plain_form(character):
    assert plain_form(character) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("un mоt dе plus", ["mоt", "dе"]),  # Cyrillic о and е
        ("Hannοver 1914", ["Hannοver"]),  # Greek omicron
        ("они cказали", ["cказали"]),  # Latin c
        ("ein о allein", ["о"]),
        ("это о том", []),
        ("der Winkel α und die Strecke λόγος", []),
        ("β-Karotin, 5 µm, naïve Œuvre", []),
        ("", []),
    ],
)
def test_look_alikes_are_words_with_letters_of_another_script(text, words):
    assert look_alike_words(text) == words


def test_characters_are_described_by_code_and_name_in_their_order():
    assert describe_characters("é\x07") == "U+0007 without a name, U+00E9 LATIN SMALL LETTER E WITH ACUTE"
