import dataclasses
import string
import time

import cv2
import fontpkg
import numpy as np
import pytest

from htr_pipeline.core.synthesis import Font, draw_style, missing_characters, render_line

FONTS = [
    Font("caveat", (fontpkg.path("caveat"),), weights=(400, 600), joined=True),
    Font("great-vibes", (fontpkg.path("great-vibes"),), joined=True),
    Font("kalam", (fontpkg.path("kalam", 300), fontpkg.path("kalam", 400))),
    Font("permanent-marker", (fontpkg.path("permanent-marker"),)),
    Font("zeyada", (fontpkg.path("zeyada"),)),
]
# Swashes, brackets and descenders at both ends, where ink is cut off most easily.
TEXTS = ['fjord, "Quay" (12:47) why? Jpf', "J", "Ways of gypsy Dog; LEFT jf", "a.", "(ff) y/g QUEUE of If"]


@pytest.fixture(params=FONTS, ids=lambda font: font.name)
def font(request):
    return request.param


def render(font, seed, text="Every hand is different.", **changes):
    rng = np.random.default_rng(seed)
    return render_line(text, dataclasses.replace(draw_style(rng, font), **changes), rng)


def test_same_seed_gives_the_same_pixels_and_another_seed_others(font):
    first, again, other = render(font, 3), render(font, 3), render(font, 4)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert first.shape != other.shape or not np.array_equal(first, other)


def test_two_lines_of_a_writer_differ_although_the_text_is_the_same(font):
    style = draw_style(np.random.default_rng(0), font)
    first, second = (render_line("same words", style, np.random.default_rng(seed)) for seed in (1, 2))
    assert first.shape != second.shape or not np.array_equal(first, second)


@pytest.mark.parametrize("text", TEXTS)
def test_no_ink_reaches_the_border(font, text):
    for seed in range(25):
        # Wide habits and clean paper, so that whatever differs from the paper on the border is ink that was cut.
        slant = (-0.45, 0.0, 0.45)[seed % 3]
        habits = {"slant": slant, "wave_height": 2.5, "drift": 0.02, "jitter": 0.08}
        image = render(font, seed, text, **habits, paper=240.0, shading=0.0, grain=0.0, rule=0.0, margins=(2, 2, 2, 2))
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert border.min() == 240, f"seed {seed}: ink of {border.min()} on the border"


def test_ink_is_dark_and_paper_light(font):
    for seed in range(20):
        image = render(font, seed)
        assert np.median(image) > 160
        assert image.min() < 130
        assert 0.02 < (image < np.median(image) - 50).mean() < 0.35


def test_lines_are_as_high_as_scanned_ones(font):
    heights = [render(font, seed).shape[0] for seed in range(30)]
    assert min(heights) >= 48
    assert max(heights) <= 130


def test_every_letter_leaves_ink(font):
    style = draw_style(np.random.default_rng(5), font)
    style = dataclasses.replace(style, ink_texture=0.0, shading=0.0, grain=0.0, rule=0.0)
    for character in string.ascii_letters + string.digits + ".,;:!?'\"()-/":
        image = render_line(character, style, np.random.default_rng(1))
        assert image.min() < style.paper - 60, character


def test_missing_characters_are_named_once_in_order(font):
    assert missing_characters(font, "a b漢,漢€字") == "".join(sorted(missing_characters(font, "€") + "漢字"))
    assert missing_characters(font, string.ascii_letters) == ""


def test_text_without_visible_character_is_an_error():
    style = draw_style(np.random.default_rng(0), FONTS[0])
    with pytest.raises(ValueError, match="Nothing to draw: '  ' has no visible character in Caveat"):
        render_line("  ", style, np.random.default_rng(0))


def test_habits_show_in_the_image():
    font, text = FONTS[2], "longer lines"
    assert render(font, 1, text, aspect=1.2).shape[1] > render(font, 1, text, aspect=0.9).shape[1]
    assert render(font, 1, text, letter_spacing=0.3).shape[1] > render(font, 1, text, letter_spacing=0.0).shape[1]
    assert render(font, 1, text, word_spacing=2.0).shape[1] > render(font, 1, text, word_spacing=0.5).shape[1]
    clean = {"shading": 0.0, "grain": 0.0, "rule": 0.0, "ink": 0.0, "paper": 255.0, "pressure": 0.0}
    thin, thick = (render(font, 1, text, stroke=stroke, **clean) for stroke in (-0.3, 0.4))
    assert (255.0 - thick).sum() > 1.2 * (255.0 - thin).sum()


def test_a_core_renders_more_than_a_hundred_lines_a_second():
    # The goal is 150; the bound leaves room for a busy machine.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        styles = [draw_style(np.random.default_rng(seed), font) for seed, font in enumerate(FONTS)]
        lines = [(text, style) for text in ["Lines of about thirty letters."] * 6 for style in styles]
        rates = []
        for _ in range(3):
            started = time.perf_counter()
            for text, style in lines:
                render_line(text, style, np.random.default_rng(0))
            rates.append(len(lines) / (time.perf_counter() - started))
    finally:
        cv2.setNumThreads(threads)
    assert max(rates) > 100
